"""The site in a real browser: no sideways scroll, a search that works, and nothing from elsewhere."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from tests.project.test_site import built, site  # noqa: F401  # the fixture, and what makes it

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow(15),
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="there is no Chromium with its chromedriver: on Debian, apt install chromium chromium-driver",
    ),
]
PAGES = ("index", "api", "CHECKPOINTS")  # the widest code and tables
# Elements to the right of the window that are in no box with a scroll bar of its own.
BEYOND = """
return [...document.querySelectorAll('.md-content *')].filter(e => {
  if (e.getBoundingClientRect().right <= document.documentElement.clientWidth + 1) return false;
  for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX)) return false;
  return true;
}).map(e => e.tagName + ' ' + e.textContent.slice(0, 60));
"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def browser(site):  # noqa: F811
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    with tempfile.TemporaryDirectory() as profile:
        # No sandbox: it needs rights that containers do not give, and the page is our own.
        for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", f"user-data-dir={profile}"):
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        found = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        try:
            found.home = f"http://127.0.0.1:{server.server_port}"
            yield found
        finally:
            found.quit()
            server.shutdown()
            server.server_close()


def window(browser, width, scheme):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )


@pytest.mark.parametrize("width", [390, 1024, 1600])
def test_code_and_tables_scroll_in_themselves(browser, width):
    window(browser, width, "light")
    for page in PAGES:
        browser.get(f"{browser.home}/{page}.html")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width, page
        assert browser.execute_script(BEYOND) == [], page


def test_it_follows_the_mode_of_the_system(browser):
    for scheme, name in (("dark", "slate"), ("light", "default")):
        window(browser, 1024, scheme)
        browser.get(f"{browser.home}/index.html")
        assert browser.find_element(By.TAG_NAME, "body").get_attribute("data-md-color-scheme") == name


def test_the_search_works_and_nothing_comes_from_elsewhere(browser):
    window(browser, 1600, "light")
    browser.get(f"{browser.home}/index.html")
    deadline = time.monotonic() + 30
    browser.find_element(By.CSS_SELECTOR, "input.md-search__input").send_keys("great circle")
    while not (results := browser.find_elements(By.CSS_SELECTOR, ".md-search-result__item a")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert any("slerp" in result.get_attribute("href") for result in results)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert urls and {urlsplit(url).hostname for url in urls if url.startswith("http")} == {"127.0.0.1"}
    assert browser.get_log("browser") == []
