"""A page of many rows packs their details: the same words as a small page, laid out when opened, found and printed."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fra.report import page as pages
from fra.report.page import render
from fra.tests.report.browser import Browser, installed
from fra.tests.report.test_browser import choose, click_at, large
from fra.tests.report.test_report import HOSTILE
from fra.verdicts.ledger import Ledger

browsing = pytest.mark.skipif(installed() is None, reason="there is no Chromium on this machine")


def many() -> Ledger:
    """The large ledger with its first claim's rows under a dozen further names; one row holds a word of its own."""
    ledger = large()
    first = [row for row in ledger.verdicts if row.claim == "T01"]
    more = [row.model_copy(update={"claim": f"U{n:02d}"}) for n in range(12) for row in first]
    place = next(n for n, row in enumerate(more) if row.claim == "U07" and row.head == "L3H1")
    more[place] = more[place].model_copy(update={"detail": {**more[place].detail, "note": f"rhubarb {HOSTILE}"}})
    notes = dict(ledger.header.claims)
    notes |= {f"U{n:02d}": notes["T01"] for n in range(12)}
    header = ledger.header.model_copy(update={"claims": notes})
    return ledger.model_copy(update={"header": header, "verdicts": [*ledger.verdicts, *more]})


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The ledger's page as it is, and as it were in one piece."""
    folder, ledger = tmp_path_factory.mktemp("packed"), many()
    assert len(ledger.verdicts) > pages.MANY
    found = {"packed": folder / "packed.html", "whole": folder / "whole.html"}
    found["packed"].write_text(render(ledger), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "MANY", len(ledger.verdicts))
        found["whole"].write_text(render(ledger), encoding="utf-8")
    return found


def test_what_is_packed_is_what_a_small_page_shows(both: dict[str, Path]) -> None:
    packed, whole = (both[name].read_text(encoding="utf-8") for name in ("packed", "whole"))
    blocks = re.findall(r'<script type="text/plain" data-packed-in="([^"]+)">([^<]+)</script>', packed)
    parts = {name: json.loads(gzip.decompress(base64.b64decode(text))) for name, text in blocks}
    place = re.compile(r'<div id="([^"]*)" data-packed="(\d+)" data-in="([^"]*)"></div>')

    def laid_out(found: re.Match[str]) -> str:
        inner = place.sub(laid_out, parts[found[3]][int(found[2])])
        return inner if found[3] == "claims" else f'<div id="{found[1]}">{inner}</div>'

    main = [re.search(r"<main.*</main>", text, re.DOTALL)[0] for text in (packed, whole)]  # type: ignore[index]
    assert "".join(place.sub(laid_out, main[0]).split()) == "".join(main[1].split())
    assert "rhubarb" in whole and "rhubarb" not in packed
    assert len(packed) < 0.3 * len(whole)
    assert render(many()) == packed, "a function of the ledger alone"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as made:
        yield made


LATER = "new Promise((done) => { const look = () => %s ? done() : setTimeout(look, 20); look(); })"
ROW = "document.getElementById('U07:L3H1')"
TEXT = f"{ROW}.textContent.replace(/\\s+/g, ' ').trim()"


@browsing
def test_details_are_laid_out_when_they_are_opened(browser: Browser, both: dict[str, Path]) -> None:
    browser.open(both["whole"])
    truth = browser(TEXT)
    assert "rhubarb <script>" in truth
    browser.open(both["packed"], "U07:L3H1")
    browser(LATER % f"{ROW}?.textContent")
    assert browser(TEXT) == truth
    assert browser(f"{ROW}.closest('details').open && {ROW}.checkVisibility()")
    other = "document.getElementById('U02:L0H7')"
    assert browser(f"{other} === null"), "far below"
    browser("document.getElementById('U02').scrollIntoView()")
    browser(LATER % other)
    assert browser(f"{other}.textContent") == ""
    browser(f"{other}.closest('details').open = true")
    browser(LATER % f"{other}?.textContent")
    browser("location.hash = 'L1H4'")
    browser(LATER % "document.querySelectorAll('#L1H4 tbody tr').length")
    assert browser("document.querySelectorAll('#L1H4 tbody tr').length") == 72


@browsing
def test_words_of_packed_details_are_found(browser: Browser, both: dict[str, Path]) -> None:
    browser.open(both["packed"])
    choose(browser, words="RHUBARB <script>")
    browser(LATER % "/shown/.test(document.getElementById('found').textContent)")
    assert browser("document.getElementById('found').textContent") == f"1 of {len(many().verdicts)} shown"
    shown = "[...document.querySelectorAll('.unit')].filter((u) => u.checkVisibility()).map((u) => u.dataset.h)"
    assert browser(shown) == ["L3H1"]


@browsing
def test_print_lays_everything_out(browser: Browser, both: dict[str, Path]) -> None:
    browser.open(both["packed"])
    packs = "document.querySelectorAll('script[data-packed-in]').length"
    browser(LATER % f"(window.fraUnpacked?.() ?? 0) === {packs}")
    browser.prefer(media="print")
    browser("dispatchEvent(new Event('beforeprint'))")
    assert browser("document.querySelectorAll('[data-packed]').length") == 0
    assert browser(f"{ROW}.checkVisibility() && {ROW}.textContent.includes('rhubarb')")
    browser.prefer()


@browsing
def test_the_wall_leads_to_packed_rows(browser: Browser, both: dict[str, Path]) -> None:
    browser.open(both["packed"])
    browser(LATER % "window.fraUnpacked() === document.querySelectorAll('script[data-packed-in]').length")
    browser("document.getElementById('wall').scrollIntoView({block: 'center'})")
    left, top, scale = browser(
        "((w) => [w.getBoundingClientRect().left, w.getBoundingClientRect().top,"
        " w.getBoundingClientRect().width / w.viewBox.baseVal.width])(document.getElementById('wall'))"
    )
    data = browser("({...document.getElementById('wall').dataset})")
    heads = dict(at.rsplit("@", 1) for at in data["heads"].split())
    line = data["claims"].split().index("U00") + 0.5
    x, y = float(heads["L0H7"]) + 1, float(data["top"]) + line * float(data["row"])
    click_at(browser, left + x * scale, top + y * scale)
    assert browser("location.hash") == "#U00:L0H7"
    browser(LATER % "document.getElementById('U00:L0H7')?.textContent")
    assert browser("document.getElementById('U00:L0H7').closest('details').open")
