"""Cards in a real browser: jumping to a number, what fits a telephone, what can be read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fra.features.query_key import query_key_cards
from fra.report import card_pages, channel_pages
from fra.tests.report.browser import Browser, installed
from fra.tests.report.test_browser import CONTRAST
from fra.tests.report.test_cards import HOOK as OUTPUT
from fra.tests.report.test_cards import hostile_card
from fra.tests.report.test_channel_cards import HOOK, LABELS, target_of

pytestmark = pytest.mark.skipif(installed() is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = query_key_cards(target_of("gpt2"), HOOK, strongest=6, named=[(1, 2)], labels=LABELS)
    made = tmp_path_factory.mktemp("cards")
    channel_pages.write_pages(found, made / "one")
    card_pages.write_pages({0: [], 1: [hostile_card()]}, made / "two", "t", OUTPUT, 2, 9, labels={7: "<b>law</b>"})
    return made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


def jump(browser: Browser, index: Path, text: str) -> tuple[str, str]:
    """Page and fragment after the index was asked for `text`, and what it said."""
    browser.open(index)
    assert browser("document.getElementById('jump').checkVisibility()")
    browser(f"document.getElementById('jump').elements.number.value = {text!r}")
    browser("document.querySelector('#jump button').click()")
    until = time.monotonic() + 20
    while time.monotonic() < until:
        time.sleep(0.2)
        with suppress(RuntimeError):  # while the page is left, there is none to ask
            there = browser("document.readyState === 'complete' && location.href")
            said = browser("(document.getElementById('said') || {textContent: ''}).textContent")
            if there and (said or "index.html" not in there):
                return there.rpartition("/")[2], said
    raise AssertionError(f"{text!r} led nowhere")


def test_the_index_jumps_to_a_feature_and_to_a_channel(browser: Browser, folder: Path) -> None:
    index = folder / "one" / "index.html"
    browser.open(index)
    feature = browser("Object.values(JSON.parse(document.getElementById('jump').dataset.pages))[0][1]")
    assert jump(browser, index, f"{feature}") == (f"features-0.html#f{feature}", "")
    assert -1 <= browser(f"document.getElementById('f{feature}').getBoundingClientRect().top") < 900
    assert jump(browser, index, "1 -> 2")[0] == "c1-2.html"
    assert jump(browser, index, "1-2")[0] == "c1-2.html"
    assert jump(browser, index, "63 -> 63") == (
        "index.html",
        "Channel 63 -> 63 has no page: see the cards of its two features.",
    )
    assert "does not fire" in jump(browser, index, "99999")[1]
    assert "1575 -> 1794" in jump(browser, index, "law")[1]
    assert jump(browser, folder / "two" / "index.html", "7")[0] == "L2H1.html#f7"
    browser.open(index, script=False)
    assert not browser("document.getElementById('jump').checkVisibility()"), "no dead control"


def test_cards_fit_a_telephone_and_every_text_stands_out(browser: Browser, folder: Path) -> None:
    pages = [
        "one/index.html",
        "one/c1-2.html",
        "one/L1H0.html",
        "one/features-0.html",
        "two/L2H1.html",
        "two/index.html",
    ]
    other = next(file for file in sorted((folder / "one").glob("c*.html")) if file.name != "c1-2.html")
    for width in (390, 1400):
        browser.size(width, 900)
        for scheme in ("light", "dark"):
            browser.prefer(prefers_color_scheme=scheme)
            for page in [*(folder / name for name in pages), other]:
                browser.open(page)
                assert browser("document.documentElement.scrollWidth") <= width, (page.name, width)
                least, where, n = browser(CONTRAST)
                assert n > 1
                assert least >= 4.5, (page.name, scheme, where)
    browser.prefer()


def test_query_and_key_are_told_without_colour(browser: Browser, folder: Path) -> None:
    page = next(file for file in sorted((folder / "one").glob("c*.html")) if 'class="query"' in file.read_text())
    browser.open(page)
    style = "getComputedStyle(document.querySelector('.t b.{}')).outlineStyle"
    assert [browser(style.format(name)) for name in ("query", "key")] == ["solid", "dashed"]
    letters = "[...document.querySelectorAll('.t b sub')].map(e => e.textContent)"
    assert set(browser(letters)) == {"q", "k"}
