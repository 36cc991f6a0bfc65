"""The page of `lossmeta report` in a real browser: at two widths, in the light, in the dark and on paper."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("selenium", reason="needs selenium")

from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from lossmeta import experiments, plot
from lossmeta.cli import app
from lossmeta.experiments import Diverged, Measure, Method, Task, Trial
from lossmeta.landscape import loss_surface

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="needs Chromium and chromedriver")
MODES = [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")]
A4 = 794  # pixels of CSS

# Of every text that is seen its contrast with what lies behind it, by WCAG 2, where that is below the least.
FAINT = """
const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
const channels = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
const behind = element => {
  for (; element; element = element.parentElement) {
    const found = channels(getComputedStyle(element).backgroundColor);
    if (found.length == 3 || found[3] > 0) return found;
  }
  return [255, 255, 255];
};
const faint = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let seen = 0;
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement, style = getComputedStyle(element);
  const box = element.getBoundingClientRect();
  if (!walker.currentNode.data.trim() || !box.width || element.closest('title, desc')) continue;
  seen += 1;
  const front = luminance(channels(element.closest('svg') ? style.fill : style.color));
  const back = luminance(behind(element));
  const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
  if (ratio < 4.5) faint.push([walker.currentNode.data, ratio]);
}
return [seen, faint];
"""
# Boxes that stand out of the page; what lies in a box that scrolls does not.
OUTSIDE = """
return [...document.querySelectorAll('body *')].filter(element => {
  const box = element.getBoundingClientRect();
  return box.width && box.right > innerWidth + 1 && !element.closest('.scroll')
}).map(element => element.outerHTML.slice(0, 100));
"""


def train(trial: Trial, rate: float) -> dict[str, float]:
    """A few steps of a small network; what is recorded has a deviation, and at one rate a hole."""
    x, y = trial.data
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for step in range(30):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        trial.record("training loss", step, None if rate == 1.0 and step == 10 else loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if rate == 1.0 and trial.seed == 2:
        raise Diverged
    if trial.seed == 0:
        surface = loss_surface(model, torch.nn.functional.cross_entropy, (x, y), points=9)
        surface.losses[0, :3] = torch.nan
        surface.save(trial.folder / f"surface-{rate:g}.safetensors")
    error = float((model(x).argmax(1) != y).double().mean())
    return {"error": error, "a measure with a name that is rather long": loss.item()}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two runs of a recipe, which stand side by side, and a folder that holds none."""
    folder = tmp_path_factory.mktemp("runs")

    def prepare(seed: int, device: torch.device) -> Any:
        return torch.randn(60, 4), torch.randint(3, (60,))

    measures = (
        Measure("error", higher_is_better=False, percent=True, digits=1),
        Measure("a measure with a name that is rather long", higher_is_better=False),
    )
    for name in ("first", "second"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plot, "installed", lambda: False)
            status = experiments.run(
                "toy",
                [
                    Task(
                        f"{name} task with_a_word_that_is_so_long_that_it_has_to_be_broken", prepare, measures
                    )
                ],
                [
                    Method(
                        f"plain, rate {rate:g}", lambda trial, rate=rate: train(trial, rate), {"rate": rate}
                    )
                    for rate in (0.01, 0.1, 0.3, 1.0)
                ],
                seeds=3,
                device="cpu",
                folder=folder / name,
                settings={"size": "small"},
                reference="plain, rate 0.1",
                about="What it is.",
                legend="What the rows are.",
                threads=1,
            )
        assert status == 0
    if plot.installed():
        drawing, (axes,) = plot.figure("test")
        axes.plot([1, 2, 3])
        plot.save(drawing, folder / "first" / "drawn.png")
    written = folder / "page.html"
    arguments = [str(folder / name) for name in ("first", "second", "none")]
    result = CliRunner().invoke(app, ["report", *arguments, "--html", str(written)])
    assert result.exit_code == 0, result.output
    return written


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def show(browser: Any, page: Path, width: int, scheme: str = "light", media: str = "screen") -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what was before
    browser.get(page.as_uri())
    assert browser.execute_script("return innerWidth") == width


def open_all(browser: Any) -> None:
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")


def requested(browser: Any) -> list[str]:
    """What was fetched since the page was asked for."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith("data:")]


@pytest.mark.parametrize(("width", "scheme"), MODES)
def test_on_a_screen(width: int, scheme: str, browser: Any, page: Path) -> None:
    show(browser, page, width, scheme)
    assert browser.get_log("browser") == []
    assert requested(browser) == [page.as_uri()]
    for _ in ("closed", "open"):
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script(OUTSIDE) == []
        seen, faint = browser.execute_script(FAINT)
        assert seen > 100 and faint == []
        open_all(browser)
    dark = (
        browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    )
    assert dark == (scheme == "dark")
    assert browser.execute_script("return document.querySelectorAll('svg .cells').length") > 4
    assert browser.execute_script("return document.querySelectorAll('svg .curve').length") > 8
    broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert browser.execute_script(broken) == 0


@pytest.mark.parametrize("width", [1280, 400])
def test_text_in_pictures_is_in_them_and_legible(width: int, browser: Any, page: Path) -> None:
    show(browser, page, width)
    found = browser.execute_script(
        """
        return [...document.querySelectorAll('svg text')].map(text => {
          const box = text.getBoundingClientRect(), around = text.closest('svg').getBoundingClientRect();
          return [text.textContent, box.height, Math.max(around.left - box.left, box.right - around.right,
            around.top - box.top, box.bottom - around.bottom)];
        });
        """
    )
    assert len(found) > 100
    assert [one for one in found if one[2] > 2] == []
    assert min(height for _, height, _ in found) > 9


def test_the_keyboard_reaches_everything(browser: Any, page: Path) -> None:
    show(browser, page, 400)
    wanted = browser.execute_script(
        "return document.querySelectorAll('a[href], summary, .scroll[tabindex]').length"
        " - document.querySelectorAll('details:not([open]) .scroll').length"
    )
    reached: dict[str, dict[str, Any]] = {}
    for _ in range(wanted + 5):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        name, at = browser.execute_script(
            """
            const at = document.activeElement, box = at.getBoundingClientRect();
            window.order = window.order || new Map();
            if (!window.order.has(at)) window.order.set(at, at.tagName + window.order.size);
            return [window.order.get(at), {tag: at.tagName, outline: getComputedStyle(at).outlineWidth,
              left: box.left, text: at.textContent}];
            """
        )
        if at["tag"] == "BODY" or name in reached:
            break
        reached[name] = at
    assert len(reached) == wanted
    first = next(iter(reached.values()))
    assert first["text"] == "Skip to the results" and first["left"] >= 0, "seen when it has the focus"
    assert {at["outline"] for at in reached.values()} == {"3px"}
    assert {at["tag"] for at in reached.values()} == {"A", "SUMMARY", "DIV"}
    summary = browser.find_element("tag name", "summary")
    browser.execute_script("arguments[0].focus()", summary)
    summary.send_keys(Keys.ENTER)
    assert browser.execute_script("return document.querySelector('details').open")


def test_on_paper(browser: Any, page: Path) -> None:
    show(browser, page, A4, "dark", media="print")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= A4
    wide = "return [...document.querySelectorAll('table')].filter(t => t.getBoundingClientRect().right > innerWidth)"
    assert browser.execute_script(f"{wide}.length") == 0
    assert (
        browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    assert browser.execute_script("return getComputedStyle(document.querySelector('nav')).display") == "none"
    seen, faint = browser.execute_script(FAINT)
    assert seen > 100 and faint == []
    pdf = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
    assert len(pdf) > 10_000


def test_a_page_that_is_too_wide_would_be_seen(browser: Any, page: Path, tmp_path: Path) -> None:
    """What the other tests look at, on a page that is wrong."""
    wrong = page.read_text(encoding="utf-8").replace(
        ".scroll { overflow-x: auto; }", "h1 { color: #eeeeee; }"
    )
    wrong = wrong.replace("default-src 'none'; ", "").replace(
        "</main>", '<img src="https://localhost:1/x.png" alt="x"></main>'
    )
    (tmp_path / "wrong.html").write_text(wrong.replace("img-src data:;", ""), encoding="utf-8")
    show(browser, tmp_path / "wrong.html", 400)
    assert browser.execute_script("return document.documentElement.scrollWidth") > 400
    assert [text for text, _ in browser.execute_script(FAINT)[1]] == ["Report of 2 runs"]
    assert len(requested(browser)) == 2
    assert browser.get_log("browser")
