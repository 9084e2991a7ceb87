"""The report in Chromium, headless: it sorts, filters, tells on hover, and asks nobody.

One browser for all tests; every page is a file, opened as a reader opens it.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from report_files import HOSTILE, hostile, many, record, session

from peftbench.cli import main
from peftbench.report.html import printable

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: .[dev]")
from selenium.webdriver.chrome.service import Service  # noqa: E402

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no chromium: apt-get install chromium chromium-driver"
)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
         "--hide-scrollbars", "--no-first-run", "--disable-extensions")  # fmt: skip
DESKTOP, PHONE = (1400, 900), (390, 844)
PLOTS = ("pareto", "memory", "training")


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.open_page = None
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The reports by name: 2 cases, 200 with a comparison, and hostile ones."""
    folder = tmp_path_factory.mktemp("pages")
    two = [record("m", "lora", "sft", 1), record("m", "ia3", "sft", 2)]
    files = {
        "2": [session(folder / "2.json", two)],
        "200": [many(folder / "a.json"), many(folder / "b.json", number=1)],
        "hostile": [hostile(folder / "h.json")],
    }  # fmt: skip
    for name, given in files.items():
        assert main(["report", *map(str, given), "-o", str(folder / f"{name}.html")]) == 0
    return {name: folder / f"{name}.html" for name in files}


def visit(browser, path: Path, size: tuple[int, int] = DESKTOP):
    """Open a page; the one that is open already is kept as it is, for loading one takes seconds."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE,
    })  # fmt: skip
    browser.get_log("browser"), browser.get_log("performance")
    if (path, size) != browser.open_page:
        browser.get(path.resolve().as_uri())
    browser.open_page = (path, size)


def see(browser, section: str) -> None:
    """Scroll a section into view and wait until each of its panels holds a drawing."""
    browser.set_script_timeout(20)
    drawn = browser.execute_async_script(
        """
        const [id, done] = arguments, box = document.getElementById(id);
        box.scrollIntoView({behavior: "instant"});
        const start = performance.now();
        const timer = setInterval(() => {
          const plots = [...box.querySelectorAll(".panel:not([hidden]) .plot")];
          const ready = plots.length > 0 && plots.every((p) => p.querySelector(".main-svg"));
          if (ready || performance.now() - start > 15000) { clearInterval(timer); done(ready); }
        }, 50);
        """,
        section,
    )
    assert drawn, f"{section} was not drawn"


def column(browser, index: int) -> list[str]:
    """The texts of a column in the rows that are shown."""
    return browser.execute_script(
        "return [...document.getElementById('table').tBodies[0].rows].filter((r) => !r.hidden)"
        ".map((r) => r.cells[arguments[0]].textContent.trim())",
        index,
    )


def press(browser, css: str) -> None:
    browser.execute_script("document.querySelector(arguments[0]).click()", css)


def choose(browser, css: str, value: str) -> None:
    browser.execute_script(
        "const e = document.querySelector(arguments[0]); e.value = arguments[1];"
        "for (const n of ['input', 'change']) e.dispatchEvent(new Event(n, {bubbles: true}))",
        css, value,
    )  # fmt: skip


def move_to(browser, x: float, y: float) -> None:
    for dx in (-3, 0):  # plotly wants to see the pointer move
        browser.execute_cdp_cmd(
            "Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x + dx, "y": y}
        )


def hover(browser, at: list[float], selector: str) -> str:
    """The text that an element shows when the pointer is there; a slow machine is waited for."""
    end = time.monotonic() + 5
    while True:
        move_to(browser, *at)
        time.sleep(0.2)
        told = browser.execute_script(
            "return document.querySelector(arguments[0]).textContent", selector
        )
        if told or time.monotonic() > end:
            return str(told)


def complaints(browser) -> list[str]:
    return [e["message"] for e in browser.get_log("browser") if e["level"] != "INFO"]


def requests(browser) -> list[str]:
    """Addresses that the page asked for, its own left out."""
    found = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            found.append(message["params"]["request"]["url"])
    return [
        u for u in found if not u.startswith("data:") and u != browser.current_url.split("#")[0]
    ]


@pytest.mark.parametrize(
    ("name", "size"),
    [("hostile", PHONE), ("hostile", DESKTOP), ("2", DESKTOP), ("200", PHONE), ("200", DESKTOP)],
)
def test_everything_is_drawn_nothing_complains_and_nothing_is_asked_for(browser, pages, name, size):
    browser.open_page = None
    visit(browser, pages[name], size)
    for section in PLOTS:
        see(browser, section)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    assert complaints(browser) == []
    assert requests(browser) == []
    assert browser.execute_script("return window.pwned") is None


def test_a_heading_sorts_both_ways_and_dashes_stay_last(browser, pages):
    visit(browser, pages["200"])
    assert len(column(browser, 0)) == 200
    perplexity = 10
    for click, reverse in enumerate((False, True)):
        press(browser, f"#table thead button[data-column='{perplexity}']")
        shown = column(browser, perplexity)
        numbers = [float(text.split(" → ")[1]) for text in shown[:160]]
        assert numbers == sorted(numbers, reverse=reverse)
        assert shown[160:] == ["–"] * 40
        heading = f"return document.querySelectorAll('#table thead th')[{perplexity}].ariaSort"
        assert browser.execute_script(heading) == ("ascending", "descending")[click]


def test_filters_narrow_the_table_together_and_reset(browser, pages):
    visit(browser, pages["200"])
    choose(browser, "#filters select[data-axis='adapter']", "lora")
    assert {text.split("-")[2] for text in column(browser, 0)} == {"lora"}
    assert browser.find_element("id", "shown").text == "40 of 200 cases"
    choose(browser, "#find", "model-3 dpo")
    assert column(browser, 0) == ["model-3-lora-dpo"]
    press(browser, "#reset")
    assert len(column(browser, 0)) == 200


def test_hover_tells_why_a_number_is_missing_and_what_a_point_is(browser, pages):
    visit(browser, pages["200"])
    at = browser.execute_script(
        "const e = document.querySelector('#table .none[data-tip^=\"not measured\"]');"
        "e.scrollIntoView({block: 'center', inline: 'center', behavior: 'instant'});"
        "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]"
    )
    assert hover(browser, at, "#tip") == "not measured: the run used cpu, no GPU"
    see(browser, "pareto")
    at = browser.execute_script(
        "const p = document.querySelector('#pareto-panels .points path');"
        "p.scrollIntoView({block: 'center', behavior: 'instant'});"
        "const r = p.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]"
    )
    told = hover(browser, at, "#pareto-panels .hoverlayer")
    assert "model-0-full-sft" in told
    assert "time 1.5 s" in told


def test_the_legend_hides_an_adapter_in_every_figure(browser, pages):
    visit(browser, pages["200"])
    for section in PLOTS:
        see(browser, section)
    count = (
        "return [...document.querySelectorAll('#pareto-panels .points path, "
        "#memory-panels .scatter.trace')].length"
    )
    before = browser.execute_script(count)
    press(browser, ".legend button[data-adapter='qlora']")
    # four panels of one model: a point less in each of the one, a line less in each of the other
    assert browser.execute_script(count) == before - 8
    press(browser, ".legend button[data-adapter='ia3']")
    pressed = "return document.querySelectorAll('.legend button[aria-pressed=\"false\"]').length"
    assert browser.execute_script(pressed) == 2 * 3  # the legend stands above three figures


def test_a_request_and_a_complaint_would_be_seen(browser, pages):
    """The two checks above can fail."""
    visit(browser, pages["200"])
    browser.execute_script("new Image().src = 'http://127.0.0.1:9/x.png'; console.error('oh')")
    assert any("oh" in text for text in complaints(browser))
    assert browser.execute_async_script(
        "const done = arguments[0]; fetch('http://127.0.0.1:9/').then(() => done('sent'), "
        "() => done('refused'))"
    ) == "refused"  # fmt: skip


def test_the_dotted_line_joins_what_no_case_beats(browser, pages):
    visit(browser, pages["200"])
    cases = [
        {"t": 3, "q": 5},
        {"t": 1, "q": 9},
        {"t": 2, "q": 9},
        {"t": 4, "q": 6},
        {"t": 4, "q": 1},
    ]
    found = browser.execute_script("return front(arguments[0], 't', 'q', 1)", cases)
    beaten = [c for c in cases if any(
        o != c and o["t"] <= c["t"] and o["q"] <= c["q"] for o in cases)]  # fmt: skip
    assert sorted((c["t"], c["q"]) for c in found) == sorted(
        (c["t"], c["q"]) for c in cases if c not in beaten
    )


def test_hostile_names_are_shown_as_they_are_written(browser, pages):
    visit(browser, pages["hostile"])
    see(browser, "pareto")
    name = printable(HOSTILE)
    assert name in column(browser, 0)[0]
    assert browser.execute_script("return document.scripts.length") == 3
    assert browser.execute_script("return document.images.length") == 0
    heading = browser.execute_script("return document.querySelector('.panel h4').textContent")
    assert heading.replace("\ufffd", "") == name.replace("\ufffd", "")


def test_a_phone_shows_the_table_within_its_width(browser, pages):
    visit(browser, pages["200"], PHONE)
    wide = browser.execute_script(
        "return [...document.querySelectorAll('section > *, header > *')].filter("
        "(e) => e.getBoundingClientRect().right > 391).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert wide == []
    small = browser.execute_script(
        "return [...document.querySelectorAll('main *')].filter((e) => e.textContent.trim() && "
        "parseFloat(getComputedStyle(e).fontSize) < 12 && !e.closest('svg')).length"
    )
    assert small == 0
