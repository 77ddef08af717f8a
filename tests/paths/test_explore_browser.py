"""The page in a real browser: sliders are dragged, and text and figures follow. Skipped where there is no Chromium."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
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


def awaited(holds):
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def settled(page):
    """Greedy and sampled text, when both have been made and nothing is being waited for."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        boxes = page.find_elements(By.CSS_SELECTOR, ".text")
        notes = page.find_elements(By.CSS_SELECTOR, ".column small[id]")
        with suppress(StaleElementReferenceException):  # of a page that is loaded anew
            old = any(b.get_attribute("class") != "text" for b in boxes)
            if boxes and not old and all(n.text.endswith(" s") for n in notes):
                return [page.find_element(By.ID, name).text for name in ("greedy", "sampled")]
        time.sleep(0.05)
    raise AssertionError("no text came")


def drag(page, name, pixels):
    ActionChains(page).drag_and_drop_by_offset(page.find_element(By.ID, f"slider-{name}"), pixels, 0).perform()


def set_number(page, name, value):
    box = page.find_element(By.CSS_SELECTOR, f"[aria-label='{name}, as a number']")
    box.clear()
    box.send_keys(value)


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


def test_clicking_in_the_plane_sets_both_sliders(page):
    """The plane reaches from -0.5 to 1.5; near a mark the point is drawn to it."""
    plane = page.find_element(By.ID, "plane")  # what is in it is drawn anew
    size = plane.size["width"]
    place = lambda x, y: ((50 + (x + 0.5) / 2 * 248) / 310 * size, (264 - (y + 0.5) / 2 * 252) / 310 * size)  # noqa: E731
    for x, y in ((0.25, 0.75), (1.01, 0.49)):
        to = [round(v - half / 2) for v, half in zip(place(x, y), (size, size * 300 / 310), strict=True)]
        ActionChains(page).move_to_element_with_offset(plane, *to).click().perform()
        found = [float(page.find_element(By.ID, f"slider-{name}").get_attribute("value")) for name in ("x", "q")]
        if x == 0.25:
            assert found == pytest.approx([x, y], abs=0.02)
    assert found == [1, 0.5]
    for name in ("x", "q"):
        set_number(page, name, "0")


def test_a_reload_keeps_the_state(page):
    set_number(page, "x", "0.7")
    text = settled(page)
    assert "alpha.x=0.7" in page.current_url and page.program.token in page.current_url
    page.refresh()
    assert settled(page) == text
    assert page.find_element(By.ID, "slider-x").get_attribute("value") == "0.7"
    assert page.find_element(By.ID, "prompt").get_attribute("value") == "the "
    set_number(page, "x", "0")


def test_a_cell_tells_its_number(page):
    set_number(page, "x", "1")
    cell = page.find_elements(By.CSS_SELECTOR, "#change rect.cell[fill]")[0]
    page.execute_script("arguments[0].scrollIntoView()", cell)
    ActionChains(page).move_to_element(cell).perform()
    awaited(lambda: " of the base" in page.find_element(By.ID, "readout").text)
    set_number(page, "x", "0")


def test_a_setting_is_copied_and_saved(page, tmp_path):
    set_number(page, "x", "0.25")
    page.find_element(By.ID, "copy-command").click()
    said = page.find_element(By.ID, "said")
    awaited(lambda: "fastinterp merge - merged" in said.text and "weight: 0.25" in said.text)
    page.find_element(By.ID, "save").click()
    folder = page.find_element(By.ID, "folder")
    folder.clear()
    folder.send_keys(str(tmp_path / "kept"), Keys.ENTER)
    awaited(lambda: f"saved in {tmp_path / 'kept'}" in said.text)
    weights = load_file(tmp_path / "kept" / "model.safetensors")
    assert weights and "of elements changed" in said.text
    page.find_element(By.ID, "save").click()
    folder.send_keys(Keys.ENTER)
    awaited(lambda: "the folder is not empty" in said.text)
    page.find_element(By.ID, "save-cancel").click()
    set_number(page, "x", "0")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1024, 1600])
def test_nothing_is_wider_than_the_window(page, width, dark):
    """At every width, light and dark; FASTINTERP_SCREENSHOTS=FOLDER keeps pictures."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    settled(page)
    assert (
        page.execute_script(
            "const {scrollWidth, clientWidth} = document.documentElement; return scrollWidth - clientWidth"
        )
        == 0
    )
    background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") is not dark
    folder = os.environ.get("FASTINTERP_SCREENSHOTS")
    if folder:
        whole = page.execute_script("return document.documentElement.scrollHeight")
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "height": whole})
        page.save_screenshot(str(Path(folder) / f"explore-{width}-{scheme['value']}.png"))
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


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
    names = ("facts", "text", "page.js", "page.css", "figures.js", "recipe", "save")
    own = {page.program.url, *(f"{page.program.origin}/{name}" for name in names)}
    assert own <= asked
    others = {url for url in asked - own if url.startswith(("http", "ws"))}
    assert others <= {f"{page.program.origin}/progress"}  # of a checkpoint that takes long to write
    severe = [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    assert [message for message in severe if "/save - Failed to load resource" not in message] == []  # what it refused


def test_what_is_refused_is_shown(page):
    seed, length = (page.find_element(By.ID, name) for name in ("seed", "length"))
    most = page.find_element(By.ID, "limit")
    assert most.text == ""
    length.clear()
    length.send_keys("4000")  # more than the model has positions
    awaited(lambda: "`length` must be in 1..63, got 4000" in page.find_element(By.ID, "greedy").text)
    assert most.text == "at most 63 tokens"
    seed.clear()
    seed.send_keys("1.5")
    length.clear()
    length.send_keys("40")
    awaited(lambda: "`seed` must be a whole number, got 1.5" in page.find_element(By.ID, "greedy").text)
    seed.clear()
    seed.send_keys("0")
    assert all(settled(page)) and most.text == ""


def test_page_says_when_the_program_has_ended(page):
    page.program.process.terminate()
    page.program.process.wait(20)
    drag(page, "x", 10)
    awaited(lambda: "The program does not answer" in page.find_element(By.ID, "greedy").text)
