"""The page in a real browser: sliders are dragged, and text and figures follow. Skipped where there is no Chromium."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.paths.test_explore_server import Program, report
from tests.support.language_models import save_model

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="there is no Chromium with its chromedriver: on Debian, apt install chromium chromium-driver",
    ),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A browser at the page of three models, one direction of which has been evaluated."""
    models = tmp_path_factory.mktemp("models")
    for name in ("base", "x", "q"):
        save_model(models / name, "" if name == "base" else name)
    added = [f"--add={name}={models / name}" for name in ("x", "q")]
    program = Program("--base", models / "base", *added, "--prompt", "the ", "--report", report(models))
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    with tempfile.TemporaryDirectory() as profile:
        # No sandbox: it needs rights that containers do not give, and the page is our own.
        for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1300,1000"):
            options.add_argument(f"--{argument}")
        options.add_argument(f"--user-data-dir={profile}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        try:
            browser.get(program.url)
            browser.program = program
            yield browser
        finally:
            browser.quit()
            program.end()


def settled(page):
    """Greedy and sampled text, when both have been made and nothing is being waited for."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        boxes = [page.find_element(By.ID, name) for name in ("greedy", "sampled")]
        notes = [page.find_element(By.ID, f"{name}-note").text for name in ("greedy", "sampled")]
        if all(b.get_attribute("class") == "text" for b in boxes) and all(n.endswith(" s") for n in notes):
            return [b.text for b in boxes]
        time.sleep(0.05)
    raise AssertionError("no text came")


def drag(page, name, pixels):
    ActionChains(page).drag_and_drop_by_offset(page.find_element(By.ID, f"slider-{name}"), pixels, 0).perform()


def colours(page):
    """Of the cells of the heat map."""
    return [r.get_attribute("fill") for r in page.find_elements(By.CSS_SELECTOR, "#change rect")]


def test_dragging_a_slider_changes_text_and_figures(page):
    before, total = settled(page), page.find_element(By.ID, "total").text
    cells, mark = colours(page), page.find_element(By.CSS_SELECTOR, "#curves .now").text
    assert mark == "0 at x = 0" and total.endswith(": 0")
    drag(page, "x", 120)
    alpha = float(page.find_element(By.ID, "slider-x").get_attribute("value"))
    assert alpha > 0.5
    after = settled(page)
    assert after[0] == "the " + "x" * 40 and after != before
    assert after[1].count("x") > 30
    assert page.find_element(By.CSS_SELECTOR, "#curves .now").text.endswith(f" at x = {alpha:g}")
    assert colours(page) != cells
    assert page.find_element(By.ID, "total").text != total
    folder = os.environ.get("FASTINTERP_SCREENSHOTS")
    if folder:
        page.save_screenshot(str(Path(folder) / "explore.png"))


def test_keyboard_and_number_box_move_a_slider(page):
    box = page.find_element(By.CSS_SELECTOR, "[aria-label='q, as a number']")
    box.clear()
    box.send_keys("5")
    assert settled(page)[0] == "the " + "q" * 40
    slider = page.find_element(By.ID, "slider-q")
    assert slider.get_attribute("value") == "1.5"  # as far as it goes
    slider.send_keys(Keys.HOME)
    assert slider.get_attribute("value") == "-0.5" == box.get_attribute("value")
    box.clear()
    box.send_keys("0")
    settled(page)


def test_another_prompt_makes_another_text(page):
    prompt = page.find_element(By.ID, "prompt")
    prompt.clear()
    prompt.send_keys("a <b>bold</b> one ")
    assert all(text.startswith("a <b>bold</b> one ") for text in settled(page))


def test_page_asks_its_own_server_alone_and_complains_of_nothing(page):
    settled(page)
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    own = {page.program.url, page.program.url + "facts", page.program.url + "text"}
    assert own <= asked
    assert {url for url in asked - own if url.startswith(("http", "ws"))} == set()
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_what_is_refused_is_shown(page):
    seed, length = (page.find_element(By.ID, name) for name in ("seed", "length"))
    most = page.find_element(By.ID, "most")
    assert not most.is_displayed()
    length.clear()
    length.send_keys("4000")  # more than the model has positions: clamped, and said
    assert all(settled(page)) and most.text == "at most 63"
    seed.clear()
    seed.send_keys("1.5")
    deadline = time.monotonic() + 20
    while "whole number" not in page.find_element(By.ID, "greedy").text and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "`seed` must be a whole number, got 1.5" in page.find_element(By.ID, "greedy").text
    for box, value in ((seed, "0"), (length, "40")):
        box.clear()
        box.send_keys(value)
    assert all(settled(page)) and not most.is_displayed()


def test_page_says_when_the_program_has_ended(page):
    page.program.process.terminate()
    page.program.process.wait(20)
    drag(page, "x", 10)
    deadline = time.monotonic() + 20
    while "does not answer" not in page.find_element(By.ID, "greedy").text and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "The program does not answer" in page.find_element(By.ID, "greedy").text
