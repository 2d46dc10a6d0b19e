"""The explorer in headless Chromium: how long until its first view stands, and from a click until the next picture.

Of each: CPU time of the page's main thread, which a busy machine changes little, and wall time until the picture
(in make bench's table).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fra.tests.explorer.large_page import large_page
from fra.tests.report.browser import Browser, installed

pytestmark = pytest.mark.skipif(installed() is None, reason="there is no Chromium on this machine")
ROUNDS = 5
FIRST_VIEW, CLICK = 2.0, 0.1  # s
BUTTON = "[...document.querySelectorAll('#panel td button')].find((b) => b.textContent.includes('{0}'))"
TAB = "document.querySelector('#tabs [data-view={0}]')"
CLICKS = {
    "a head not seen before": ("v=cell", "document.querySelectorAll('#heads button')[{round}]"),
    "a cell of the pattern": ("v=cell&q=50", "document.getElementById('pattern')"),
    "a row": ("v=cell&q=63", TAB.format("row")),
    "key against key": ("v=row&q=63", BUTTON.format("against")),
    "raw scores": ("v=cell", "document.querySelector('#panel input')"),
    "a channel": ("v=cell", BUTTON.format("→")),
    "a channel off": ("v=cell", BUTTON.format("off")),
    "search begins": ("v=cell", TAB.format("search")),
    "head outputs": ("v=cell", TAB.format("output")),
    "sources of an output": ("v=output", "document.querySelector('#panel summary')"),
    "a feature": ("v=pair&c={channel}", "document.querySelector('#panel p button')"),
}
PREPARE = """(() => {
  const at = %s;
  at.scrollIntoView({block: "center"});
  window.painted = new Promise((done) => addEventListener("click", () => {
    const began = performance.now();
    requestAnimationFrame(() => {
      const channel = new MessageChannel();
      channel.port1.onmessage = () => done(performance.now() - began);
      channel.port2.postMessage(0);
    });
  }, {capture: true, once: true}));
  const box = at.getBoundingClientRect();
  return [box.left + box.width / 2, box.top + box.height / 2];
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_page(tmp_path_factory.mktemp("explorer"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as made:
        made.call("Performance.enable", timeDomain="threadTicks")
        yield made


def cpu(browser: Browser) -> float:
    """CPU seconds of the page's main thread so far."""
    found = browser.call("Performance.getMetrics")["metrics"]
    return float(next(one["value"] for one in found if one["name"] == "TaskDuration"))


def record(benchmark: Any, take: Callable[[], tuple[float, float]], what: str, reach: float) -> None:
    measured: list[tuple[float, float]] = []
    benchmark.pedantic(lambda: measured.append(take()), rounds=ROUNDS, warmup_rounds=0)
    cpu_s, wall_s = (min(values) for values in zip(*measured, strict=True))
    middle = statistics.median(wall for _, wall in measured)
    benchmark.extra_info.update(explorer=what, cpu_s=cpu_s, wall_s=wall_s, median_wall_s=middle, reach_s=reach)


def test_first_view(benchmark: Any, browser: Browser, page: Path) -> None:
    def take() -> tuple[float, float]:
        browser.open(page)
        ends = "performance.getEntriesByType('navigation')[0].loadEventEnd / 1000"
        wall = browser(f"new Promise((done) => requestAnimationFrame(() => setTimeout(() => done({ends}))))")
        return wall, wall  # a page is loaded in a process of its own, whose CPU time begins with it

    record(benchmark, take, f"first view, {page.stat().st_size / 1e6:.1f} MB", FIRST_VIEW)


@pytest.mark.parametrize("what", CLICKS)
def test_a_click(benchmark: Any, browser: Browser, page: Path, what: str) -> None:
    address, find = CLICKS[what]
    number = 0

    def take() -> tuple[float, float]:
        nonlocal number
        browser.open(page, "v=cell&q=60")
        channel = browser("(({ i, j }) => `${i}-${j}`)(fra.head(place()).pairs(60, 59, 'nothing', false).one(0))")
        browser(f"location.hash = {address.format(channel=channel)!r}")
        browser("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 100)))")
        x, y = browser(PREPARE % find.format(round=number + 1))
        number += 1
        before = cpu(browser)
        for kind in ("mousePressed", "mouseReleased"):
            browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        wall = browser("painted") / 1000
        return cpu(browser) - before, wall

    record(benchmark, take, f"click: {what}", CLICK)


@pytest.mark.parametrize("by", ["sum", "mean", "peak"])
def test_search_of_all_channels(benchmark: Any, browser: Browser, page: Path, by: str) -> None:
    """What stands there some time after the click, which it does not hold up."""
    browser.open(page)

    def take() -> tuple[float, float]:
        before = cpu(browser)
        asked = f"{{by: '{by}', least: 1}}"
        wall = browser(
            "(async () => { const t = performance.now();"
            f" const found = await search(fra.head(0), {asked}, () => true);"
            " if (found.length !== 100) throw 1; return performance.now() - t; })()"
        )
        return cpu(browser) - before, wall / 1000

    record(benchmark, take, f"search by {by}, all channels", 2.0)
