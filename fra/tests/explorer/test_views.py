"""The explorer's views: each has an address that shows it again, the keyboard reaches all, and what a view says is what
the page computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fra
from fra.explorer import explore
from fra.tests.explorer.test_explorer import HOOK, TEXT, browsing
from fra.tests.models import tiny, tiny_sae
from fra.tests.report.browser import Browser

VIEWS = ("cell", "row", "pair", "search", "what", "output", "feature")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as made:
        yield made


@pytest.fixture(scope="module")
def target() -> Any:
    return fra.load(tiny("llama"), [tiny_sae(HOOK), tiny_sae("blocks.1.attn.hook_z")], [TEXT, TEXT[::-1]])


@pytest.fixture(scope="module")
def page(target: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("explorer") / "page.html"
    explore(target, TEXT, layer=1, precision="float32", output=file)
    return file


def settled(browser: Browser) -> None:
    """Waits until what is filled in later stands there."""
    look = "const look = () => /…|searching/.test(document.getElementById('panel').textContent)"
    browser(f"new Promise((done) => {{ {look} ? setTimeout(look, 20) : done(); look(); }})")


SHOWN = "document.getElementById('panel').textContent + document.getElementById('pattern').ariaLabel"


def click(browser: Browser, text: str, within: str = "#panel button") -> None:
    browser(f"[...document.querySelectorAll({within!r})].find((x) => x.textContent.includes({text!r})).click()")


@browsing
def test_every_view_has_an_address_that_shows_it_again(browser: Browser, page: Path) -> None:
    browser.open(page, "h=1&q=9&k=4")
    seen: dict[str, str] = {}

    def remember() -> None:
        settled(browser)
        seen[browser("location.hash")] = browser(SHOWN)

    remember()
    click(browser, "off")
    for view in VIEWS:
        browser(f"document.querySelector('#tabs [data-view={view}]').click()")
        remember()
        if view == "cell":
            browser("document.querySelectorAll('#panel input')[0].click()")
            remember()
            browser("document.querySelectorAll('#panel input')[1].click()")
            remember()
        elif view == "row":
            click(browser, "against")
            remember()
        elif view == "search":
            browser("document.querySelectorAll('#panel input[type=checkbox]')[2].click()")
            remember()
            click(browser, "→")
            remember()
        elif view == "output":
            for depth in (1, 2, 3):
                browser(f"document.querySelector({' '.join(['#panel'] + depth * ['details']) + ' summary'!r}).click()")
                browser("new Promise((done) => setTimeout(done, 60))")
                remember()
            browser("document.querySelector('#panel details details details p button').click()")
            remember()
    assert len(seen) >= 13
    assert len(set(seen.values())) == len(seen), "no two show the same"
    for address, text in seen.items():
        browser.open(page, address[1:])
        settled(browser)
        assert browser("location.hash") == address
        assert browser(SHOWN) == text, address


@browsing
def test_the_keyboard_reaches_every_view_head_and_cell(browser: Browser, page: Path) -> None:
    browser.open(page, "h=1&q=9&k=4")
    for number, view in enumerate(VIEWS, 1):
        browser.press(str(number), 48 + number)
        assert browser("document.querySelector('#tabs [aria-current]').dataset.view") == view
    for key, code, head in (("]", 221, 2), ("]", 221, 3), ("]", 221, 0), ("[", 219, 3)):
        browser.press(key, code)
        assert browser("document.querySelector('#heads [aria-pressed=true]').dataset.head") == str(head)
    browser("document.getElementById('pattern').focus()")
    for key, code, cell in (("Up", 38, "8 4"), ("Right", 39, "8 5"), ("Down", 40, "9 5"), ("Left", 37, "9 4")):
        browser.press(f"Arrow{key}", code)
        assert browser("`${state.q} ${state.k}`") == cell
    browser.open(page, "h=1&q=9&k=4")
    reached = set()
    for _ in range(60):
        browser.press("Tab", 9)
        reached.add(browser("document.activeElement.closest('#heads, #tabs, #pattern, .pick, #panel')?.id || 'pick'"))
    assert reached >= {"heads", "tabs", "pattern", "pick", "panel"}


@browsing
def test_a_row_holds_its_keys_against_each_other(browser: Browser, page: Path, target: Any) -> None:
    browser.open(page, "h=1&q=9&k=4&v=row&a=2")
    settled(browser)
    m = fra.resolve(target.model, tiny_sae(HOOK), target.tokens(TEXT), 1, 1)
    scores, pattern = m.scores(), m.frozen.attention(m.scores())
    rows = browser(
        "[...document.querySelector('#panel tbody').rows].map((r) => [...r.cells].map((c) => c.textContent))"
    )
    assert [int(row[0].split()[0]) for row in rows] == np.argsort(-pattern[9, :10].numpy()).tolist()
    for row in rows:
        key = int(row[0].split()[0])
        numbers = [float(text.replace("−", "-")) for text in row[1:7]]
        assert numbers[0] == pytest.approx(float(pattern[9, key]), rel=6e-3)
        assert numbers[1] == pytest.approx(float(scores[9, key]), rel=6e-3)
        assert sum(numbers[2:]) == pytest.approx(float(scores[9, key]), abs=0.05)
        own = {}
        for other in range(10):
            q, k, values = m.pair(9, other)
            for x, i in enumerate(q.tolist()):
                for y, j in enumerate(k.tolist()):
                    own[i, j] = own.get((i, j), 0.0) + float(values[x, y]) * ((other == key) - 0.1)
        live = set(m.pair(9, key)[1].tolist())
        best = max(((abs(value), pair) for pair, value in own.items() if pair[1] in live))[1]
        assert row[7].startswith(f"{best[0]} → {best[1]} ")
    difference = browser("[...document.querySelectorAll('#panel p b')].map((b) => b.textContent)")
    assert float(difference[-1].replace("−", "-")) == pytest.approx(float(scores[9, 4] - scores[9, 2]), rel=6e-3)


@browsing
def test_what_if_shows_the_attention_without_a_channel(browser: Browser, page: Path, target: Any) -> None:
    browser.open(page, "h=1&q=9&k=4")
    click(browser, "off")
    [channel] = browser("channels()")
    assert channel["factor"] == 0
    m = fra.resolve(target.model, tiny_sae(HOOK), target.tokens(TEXT), 1, 1)
    for factor in (0.0, -1.5):
        if factor:
            set_to = f"input.value = '{factor}'; input.dispatchEvent(new Event('change', {{bubbles: true}}))"
            browser(f"(() => {{ const input = document.querySelector('#panel input[type=number]'); {set_to} }})()")
        else:
            browser("document.querySelector('#tabs [data-view=what]').click()")
        map_ = m.channel(channel["i"], channel["j"])
        now = m.frozen.attention(m.scores() + (factor - 1) * map_)
        rows = browser(
            "[...[...document.querySelectorAll('#panel table')].pop().tBodies[0].rows]"
            ".map((r) => [...r.cells].map((c) => c.textContent))"
        )
        assert len(rows) == 10
        assert float(map_[9].abs().max()) > 0
        for row in rows:
            assert float(row[2]) == pytest.approx(float(now[9, int(row[0].split()[0])]), rel=6e-3)


@browsing
def test_numbers_keep_their_size(browser: Browser, page: Path) -> None:
    browser.open(page)
    numbers = [0.0, -0.0, 1.0, 100.0, -120.7, 0.5, 0.1004, 1e10, 2e20, -2.68e-30, 1e-10, 999.6, 1234567.0, 7e100]
    shown = browser(f"{numbers}.map(number)")
    for x, text in zip(numbers, shown, strict=True):
        assert float(text.replace("−", "-")) == float(f"{x:.3g}"), (x, text)
    assert browser("[NaN, Infinity].map(number)") == ["–", "–"]
