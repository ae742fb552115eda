"""The web page in a real, headless Chromium; run by ``make test-browser``, which installs what it needs.

Screenshots go to ``build/screenshots``.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lexiseg.samples import sample_path

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402

from tests.app.test_service import SMALL, Running  # noqa: E402

pytestmark = pytest.mark.browser
SHOTS = Path(__file__).parents[2] / "build" / "screenshots"
WORDS = "giraffe; elephant; butterfly; tree; leaves, bush; grass"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    found = Running(SMALL)
    yield found
    found.stop()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium and driver, "install Debian's chromium and chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    quiet = ("background-networking", "component-update", "sync", "gpu", "quic", "dev-shm-usage")
    for argument in ("--headless=new", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.add_argument("--window-size=1280,1000")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield found
    found.quit()


def until(check: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := check():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


class Page:
    """The page as a person sees it."""

    def __init__(self, browser: Any, port: int) -> None:
        self.browser = browser
        browser.get(f"http://127.0.0.1:{port}/")
        until(lambda: len(Select(self.by("model")).options) == 1)

    def by(self, name: str) -> Any:
        return self.browser.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return str(self.by(name).text)

    def shoot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.browser.save_screenshot(str(SHOTS / f"{name}.png"))

    def pixels(self) -> Any:
        script = (
            "const c = document.getElementById('canvas'), p = c.getContext('2d');"
            "const d = p.getImageData(0, 0, c.width, c.height).data;"
            "let s = 0; for (let i = 0; i < d.length; i++) s = (s * 31 + d[i]) % 1000003; return s;"
        )
        return self.browser.execute_script(script)

    def segment(self, path: Path | None = None, words: str = WORDS) -> None:
        if path is not None:
            self.by("files").send_keys(str(path))
        self.by("classes").clear()
        self.by("classes").send_keys(words)
        self.by("run").click()
        until(lambda: self.by("masks").is_displayed() or self.text("error"))
        until(lambda: self.by("run").is_enabled())


def test_upload_classes_result_toggle_and_downloads(browser: Any, running: Running, tmp_path: Path) -> None:
    page = Page(browser, running.port)
    page.segment(sample_path("demo"))
    legend = [item.text for item in page.by("legend").find_elements(By.TAG_NAME, "li")]
    assert any("giraffe" in line and "(unseen)" in line for line in legend) and any(
        "elephant" in line for line in legend
    )
    page.shoot("result")
    before = page.pixels()
    page.by("legend").find_elements(By.TAG_NAME, "input")[0].click()
    assert page.pixels() != before
    page.by("legend").find_elements(By.TAG_NAME, "input")[0].click()
    assert page.pixels() == before
    webdriver.ActionChains(browser).move_to_element(page.by("canvas")).perform()
    assert page.text("hover") in {*(name.split(",")[0] for name in WORDS.split("; ")), "no class"}
    for kind, name in (
        ("labels", "demo_labels.png"), ("overlay", "demo_overlay.png"), ("coco", "demo_coco.json"),
        ("geojson", "demo.geojson"), ("json", "demo.json"),
    ):  # fmt: skip
        browser.find_element(By.CSS_SELECTOR, f"[data-kind={kind}]").click()
        until(lambda name=name: (tmp_path / name).is_file())
    until(lambda: (tmp_path / "demo_coco.json").stat().st_size)
    annotations = json.loads((tmp_path / "demo_coco.json").read_text())
    assert {"images", "annotations", "categories"} <= annotations.keys()
    browser.find_element(By.CSS_SELECTOR, "[data-kind=scores]").click()
    until(lambda: len(page.by("maps").find_elements(By.TAG_NAME, "figure")) == 6)
    page.shoot("scores")


def test_classes_are_checked_as_they_are_typed(browser: Any, running: Running) -> None:
    page = Page(browser, running.port)
    page.by("classes").send_keys("giraffe; elephant")
    until(lambda: "2 classes" in page.text("check") and "giraffe (unseen)" in page.text("check"))
    page.by("classes").send_keys("; giraffe")
    until(lambda: "twice" in page.text("check"))
    page.by("classes").clear()
    page.by("classes").send_keys("cat; " + "very " * 90 + "long")
    until(lambda: "shorter name" in page.text("check"))


def test_mistakes_are_the_service_s_sentences(browser: Any, running: Running, tmp_path: Path) -> None:
    page = Page(browser, running.port)
    page.by("run").click()
    until(lambda: "No picture is chosen" in page.text("error"))
    wrong = tmp_path / "wrong.png"
    wrong.write_bytes(b"no picture")
    page.segment(wrong, "cat; dog")
    assert "picture" in page.text("error") and not page.by("result").is_displayed()
    page.shoot("error")


def test_several_pictures_and_a_sample(browser: Any, running: Running) -> None:
    page = Page(browser, running.port)
    page.by("files").send_keys("\n".join(str(sample_path(name)) for name in ("harbour", "street")))
    Select(page.by("sample")).select_by_value("demo")
    page.segment(words="water; road; grass")
    assert len(Select(page.by("which")).options) == 3


def test_with_the_keyboard_alone(browser: Any, running: Running) -> None:
    page = Page(browser, running.port)

    def focused() -> str:
        return str(browser.switch_to.active_element.get_attribute("id"))

    def tab_to(name: str) -> None:
        for _ in range(20):
            webdriver.ActionChains(browser).send_keys(Keys.TAB).perform()
            if focused() == name:
                return
        raise AssertionError(f"the tabulator does not reach {name}")

    tab_to("sample")
    browser.switch_to.active_element.send_keys("demo")
    tab_to("classes")
    browser.switch_to.active_element.send_keys("elephant; grass; leaves")
    tab_to("run")
    webdriver.ActionChains(browser).send_keys(Keys.ENTER).perform()
    until(lambda: page.by("masks").is_displayed())
    tab_to("opacity")
    before = page.pixels()
    webdriver.ActionChains(browser).send_keys(Keys.ARROW_LEFT * 20).perform()
    assert page.pixels() != before


def test_on_a_narrow_screen(browser: Any, running: Running) -> None:
    browser.set_window_size(500, 900)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    page = Page(browser, running.port)
    Select(page.by("sample")).select_by_value("demo")
    page.segment(words="elephant; grass")
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    page.shoot("narrow")


def test_a_box_drawn_on_a_picture_becomes_a_class(browser: Any, running: Running) -> None:
    page = Page(browser, running.port)
    Select(page.by("sample")).select_by_value("demo")
    until(lambda: page.by("canvas").is_displayed())
    assert not page.by("masks").is_displayed()
    page.by("example").find_element(By.TAG_NAME, "summary").click()
    page.by("add").click()
    assert "no box" in page.text("error")
    ends = [page.by(name).rect["y"] + page.by(name).rect["height"] for name in ("box", "name", "add")]
    assert max(ends) - min(ends) < 2  # in one line
    drag = webdriver.ActionChains(browser).move_to_element_with_offset(page.by("canvas"), -60, -40)
    drag.click_and_hold().move_by_offset(80, 100).release().perform()
    left, top, right, bottom = (int(side) for side in page.by("box").get_attribute("value").split())
    assert (right - left, bottom - top) == (80, 100) and page.by("frame").is_displayed()
    assert browser.switch_to.active_element.get_attribute("id") == "name"
    page.by("name").send_keys("thing")
    page.shoot("example")
    page.by("add").click()
    assert "thing: a box in demo.png" in page.text("exemplars") and not page.by("frame").is_displayed()
    page.by("box").send_keys("10 20 60 90")  # as who has no pointer does
    page.by("name").send_keys("other")
    page.by("add").click()
    page.by("files").send_keys(str(sample_path("street")))
    page.segment(words="grass; road")
    for _ in range(2):  # the picture of the examples, and another one
        assert browser.execute_script("return current.answer.names") == ["grass", "road", "thing", "other"]
        Select(page.by("which")).select_by_index(1)
    page.by("exemplars").find_elements(By.TAG_NAME, "button")[0].click()
    page.segment(words="")
    assert browser.execute_script("return current.answer.names") == ["other"]


NAMES = [f"number {i} of many classes with a name" if i % 7 else f"{'hauptbetriebswerk' * 5}{i}" for i in range(50)]


@pytest.mark.parametrize("width", [360, 1280])
def test_fifty_classes_with_long_names_leave_the_page_in_shape(browser: Any, running: Running, width: int) -> None:
    metrics = {"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page = Page(browser, running.port)
    page.segment(sample_path("demo"), "\n".join(NAMES))
    until(lambda: "50 classes" in page.text("check"))
    page.shoot(f"long-{width}")
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert page.by("check").size["height"] < 200  # the button below it stays in reach
    corner = webdriver.ActionChains(browser).move_to_element_with_offset(page.by("canvas"), 150, 0)
    corner.perform()
    assert page.by("hover").is_displayed()
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize(("size", "shown"), [((60, 1200), (1, 700)), ((16, 8), (256, 200))], ids=["tall", "tiny"])
def test_a_tall_picture_fits_and_a_tiny_one_is_enlarged(
    browser: Any, running: Running, tmp_path: Path, size: tuple[int, int], shown: tuple[int, int]
) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    page = Page(browser, running.port)
    Image.new("RGB", size, "green").save(tmp_path / "picture.png")
    page.segment(tmp_path / "picture.png", "grass; brick")
    box = page.by("canvas").rect
    assert box["width"] >= shown[0] and box["height"] <= shown[1]
    assert box["width"] / box["height"] == pytest.approx(size[0] / size[1], rel=0.05)


def test_downloads_are_of_the_result_that_is_shown(browser: Any, running: Running, tmp_path: Path) -> None:
    page = Page(browser, running.port)
    page.segment(sample_path("demo"), "elephant; grass")
    page.by("classes").clear()
    page.by("classes").send_keys("tree")
    browser.find_element(By.CSS_SELECTOR, "[data-kind=geojson]").click()
    until(lambda: (tmp_path / "demo.geojson").is_file() and (tmp_path / "demo.geojson").stat().st_size)
    found = json.loads((tmp_path / "demo.geojson").read_text())
    assert {part["properties"]["name"] for part in found["features"]} == {"elephant", "grass"}


def test_a_picture_may_be_dropped_anywhere(browser: Any, running: Running) -> None:
    page = Page(browser, running.port)
    browser.execute_async_script(
        "const done = arguments[0];"
        "fetch('samples/demo').then(reply => reply.blob()).then(blob => {"
        "  const data = new DataTransfer(); data.items.add(new File([blob], 'dropped.png', {type: 'image/png'}));"
        "  document.querySelector('h1').dispatchEvent("
        "    new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})); done(); });"
    )
    until(lambda: page.by("canvas").is_displayed())
    assert Select(page.by("which")).first_selected_option.text == "dropped.png"


def test_the_sample_just_chosen_is_shown_and_a_picture_browsers_cannot_show_is_named(
    browser: Any, running: Running, tmp_path: Path
) -> None:
    page = Page(browser, running.port)
    page.by("files").send_keys(str(sample_path("street")))
    Select(page.by("sample")).select_by_value("demo")
    until(lambda: len(Select(page.by("which")).options) == 2)
    assert browser.execute_script("return current.name") == "demo.png"
    page.by("files").clear()
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.tif")
    page.segment(tmp_path / "picture.tif", "grass; brick")
    assert "convert it to PNG or JPEG" in page.text("error")


def test_errors_can_be_read_in_the_dark(browser: Any, running: Running) -> None:
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    page = Page(browser, running.port)
    page.by("run").click()
    until(lambda: page.text("error"))
    color = page.by("error").value_of_css_property("color")
    assert min(int(part) for part in re.findall(r"\d+", color)[:3]) > 150  # on almost black
    page.shoot("dark")
