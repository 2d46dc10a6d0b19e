"""The page in a real browser: what opens, what the keyboard reaches, what is printed, what can be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fra.report.page import render
from fra.tests.report.browser import Browser, installed
from fra.tests.report.test_report import full_ledger, strip
from fra.tests.verdicts.test_claim import BAD, CLAIM, GOOD, OPEN, evidence
from fra.tests.verdicts.test_ledger import make_ledger
from fra.verdicts.ledger import Ledger, note_of

pytestmark = pytest.mark.skipif(installed() is None, reason="there is no Chromium on this machine")

N_CLAIMS = 60
LONG = "a reason that does not fit a line of a telephone, " * 4


def large() -> Ledger:
    """Sixty claims, of which the first speaks about the 144 heads of a model of twelve layers."""
    effects = {"L1H4": 3.0, "L0H7": 1.7, "L0H2": 2.5}
    shown = {
        "maps": {"tokens": ["token"] * 40, "maps": {"m": [[1.0] * (t + 1) for t in range(40)]}},
        "a name that is longer than any telephone is wide, in letters of the page": {"a": 1, "b": [1, 2]},
        "strip": strip(),
    }
    rows = [
        evidence(
            (replace(GOOD, effect=effects.get(name, 2.0), low=1.2) if name in effects else BAD if head % 2 else OPEN,),
            head=name,
            detail=shown | {"note": LONG} if name == "L1H4" else {},
        )
        for layer in range(12)
        for head in range(12)
        for name in [f"L{layer}H{head}"]
    ]
    ledger = make_ledger(*rows)
    few = [row for row in ledger.verdicts if row.head in effects]
    names = [f"T{n:02d}" for n in range(2, N_CLAIMS + 1)]
    more = [row.model_copy(update={"claim": name}) for name in names for row in few]
    notes = {name: note_of(CLAIM, exploratory=False) for name in ["T01", *names]}
    other = note_of(replace(CLAIM, kind="identity"), exploratory=False).model_copy(update={"title": "Sums are exact"})
    return Ledger(
        schema=1,
        header=ledger.header.model_copy(update={"claims": notes | {"T60": other}}),
        verdicts=[*ledger.verdicts, *more],
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "page.html"
    file.write_text(render(large()), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def started() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def browser(started: Browser) -> Browser:
    started.size(1400, 1000)
    started.prefer()
    return started


OPENED = "[...document.querySelectorAll('details[open]')].map(d => d.querySelector('[id]').id)"
SHOWN = "[...document.querySelectorAll('.unit')].filter(u => u.checkVisibility()).length"


@pytest.mark.parametrize("script", [True, False])
@pytest.mark.parametrize("width", [1400, 390])
def test_an_address_opens_its_row_and_shows_it(browser: Browser, page: Path, script: bool, width: int) -> None:
    browser.size(width, 1000)
    browser.open(page, "T31:L1H4", script=script)
    assert browser(OPENED) == ["T31:L1H4"]
    top = "document.getElementById('T31:L1H4').closest('.unit').getBoundingClientRect().top"
    assert 0 <= browser(top) < 400, "with the row's numbers in sight"
    browser.open(page, "L1H4", script=script)
    assert browser(OPENED) == ["L1H4"]
    assert browser("document.querySelectorAll('#L1H4 tbody tr').length") == N_CLAIMS


def test_an_address_shows_its_row_although_it_was_filtered_away(browser: Browser, page: Path) -> None:
    browser.open(page)
    choose(browser, head="L0H2")
    browser("location.hash = 'T31:L1H4'")
    assert browser("new Promise(r => setTimeout(() => r(document.getElementById('T31:L1H4').checkVisibility()), 300))")
    assert browser(OPENED) == ["T31:L1H4"]


def test_the_first_row_is_less_than_a_hundred_stops_away_and_the_skip_link_leads_there(
    browser: Browser, page: Path
) -> None:
    browser.open(page)
    stops = 0
    while not browser("!!document.activeElement.closest('main')"):
        browser.press("Tab", 9)
        stops += 1
        assert stops < 100
    assert stops > N_CLAIMS, "every claim is a stop"
    browser.open(page)
    browser.press("Tab", 9)
    assert browser("document.activeElement.textContent") == "Skip to the verdicts"
    assert browser("document.activeElement.getBoundingClientRect().left") >= 0, "seen where it is the focus"
    browser("document.activeElement.click()")
    assert browser("location.hash") == "#verdicts"
    browser.press("Tab", 9)
    assert browser("!!document.activeElement.closest('main .unit')")
    browser("document.querySelector('.top').click()")
    assert browser("scrollY") == 0


def choose(browser: Browser, **values: str) -> None:
    for name, value in values.items():
        browser(
            f"(e => {{ e.value = {value!r}; e.dispatchEvent(new Event('input', {{bubbles: true}}));"
            f" e.dispatchEvent(new Event('change', {{bubbles: true}})); }})(document.forms[0].elements[{name!r}])"
        )


def test_search_and_filters_leave_what_fits(browser: Browser, page: Path) -> None:
    rows = large().verdicts
    browser.open(page)
    assert browser(SHOWN) == len(rows)
    assert browser("document.getElementById('found').textContent") == ""
    for values, n in (
        ({"head": "L1H4"}, N_CLAIMS),
        ({"verdict": "REFUTED"}, sum(row.verdict == "REFUTED" for row in rows)),
        ({"verdict": "BROKEN"}, 0),
        ({"kind": "identities"}, 3),
        ({"words": "sums EXACT"}, 3),
        ({"words": "telephone t02"}, 1),
        ({"head": "L1H4", "kind": "identities"}, 1),
    ):
        choose(browser, **values)
        assert browser(SHOWN) == n, values
        assert browser("document.getElementById('found').textContent") == f"{n} of {len(rows)} shown"
        sections = "[...document.querySelectorAll('section.claim')].filter(s => s.checkVisibility()).length"
        assert browser(sections) <= n, "no empty section"
        listed = "[...document.querySelectorAll('.index tbody tr')].filter(r => r.checkVisibility()).length"
        assert browser(listed) == browser(sections), "nor one in the list of claims"
        browser("document.querySelector('button[type=reset]').click()")
        assert browser(f"new Promise(r => setTimeout(() => r({SHOWN}), 300))") == len(rows)


def test_rows_of_a_claim_are_put_in_order(browser: Browser, page: Path) -> None:
    browser.open(page)
    order = "[...document.querySelectorAll('#T02 .unit')].map(u => u.dataset.h)"
    assert browser(order) == ["L0H2", "L0H7", "L1H4"]
    choose(browser, order="effect")
    assert browser(order) == ["L1H4", "L0H2", "L0H7"]
    choose(browser, order="verdict")
    words = "[...new Set([...document.querySelectorAll('#T01 .unit')].map(u => u.dataset.v))]"
    assert browser(words) == ["SUPPORTED", "REFUTED", "INCONCLUSIVE"]
    choose(browser, order="head")
    assert browser(order) == ["L0H2", "L0H7", "L1H4"]


@pytest.mark.parametrize("script", [True, False])
def test_print_shows_all_details_and_no_controls(browser: Browser, page: Path, script: bool) -> None:
    browser.open(page, script=script)
    closed = "[...document.querySelectorAll('details > div')].filter(d => !d.checkVisibility()).length"
    assert browser(closed) > N_CLAIMS
    browser.prefer(media="print")
    if script:
        browser("dispatchEvent(new Event('beforeprint'))")
        assert browser("document.querySelectorAll('details:not([open])').length") == 0, "for browsers that need it"
    assert browser(closed) == 0
    assert browser("document.querySelector('.top').checkVisibility()") is False
    assert browser("document.getElementById('find').checkVisibility()") is False
    if script:
        browser("dispatchEvent(new Event('afterprint'))")
        assert browser(OPENED) == []


def test_without_its_script_the_page_has_all_rows_and_no_dead_controls(browser: Browser, page: Path) -> None:
    browser.open(page, script=False)
    assert browser(SHOWN) == len(large().verdicts)
    assert browser("document.getElementById('find').checkVisibility()") is False


CONTRAST = """(() => {
  const color = (text) => {
    const found = text.match(/[\\d.e-]+/g).map(Number);
    const [r, g, b, a = 1] = text.startsWith("color(") ? [...found.slice(0, 3).map((x) => 255 * x), found[3]] : found;
    return [r, g, b, a];
  };
  const over = ([r, g, b, a], under) => [r, g, b].map((x, k) => a * x + (1 - a) * under[k]);
  const ground = (element) => {
    const chain = [];
    for (let at = element; at; at = at.parentElement) chain.unshift(color(getComputedStyle(at).backgroundColor));
    return chain.reduce((under, layer) => over(layer, under), [255, 255, 255]);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((x) => ((x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  for (const details of document.querySelectorAll("details")) details.open = true;
  const least = [99, ""];
  const seen = new Set();
  for (const element of document.querySelectorAll("body *:not(script):not(option)")) {
    if (![...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
    const style = getComputedStyle(element);
    const ink = color(element instanceof SVGElement ? style.fill : style.color);
    const under = ground(element);
    const [x, y] = [light(over(ink, under)), light(under)];
    const contrast = (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
    seen.add(`${ink} on ${under}`);
    if (contrast < least[0]) least.splice(0, 2, contrast, element.outerHTML.slice(0, 200));
  }
  return [...least, seen.size];
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(browser: Browser, tmp_path: Path, scheme: str) -> None:
    """Contrast of at least 4.5 (WCAG AA), every verdict, shade and flag among the texts."""
    shades = [
        {
            "tokens": [f"t{k}" for k in range(1, 11)],
            "values": " ".join(str(sign * k) for k in range(1, 11)),
            "marked": 9,
        }
        for sign in (1, -1)
    ]
    more = evidence((GOOD,), head="L5H0", detail={"s": {"strips": {"up": shades[0], "down": shades[1]}}})
    ledger = full_ledger()
    ledger = ledger.model_copy(update={"verdicts": [*ledger.verdicts, *make_ledger(more).verdicts]})
    file = tmp_path / "page.html"
    file.write_text(render(ledger), encoding="utf-8")
    browser.prefer(prefers_color_scheme=scheme)
    browser.open(file, "T01:L5H0")
    least, where, n = browser(CONTRAST)
    assert n > 20, "texts on many grounds"
    assert least >= 4.5, where


def click_at(browser: Browser, x: float, y: float) -> None:
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


def test_a_click_on_the_wall_opens_the_row_below_it(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser("document.getElementById('wall').scrollIntoView({block: 'center'})")
    box = browser("(b => [b.left, b.top, b.width])(document.getElementById('wall').getBoundingClientRect())")
    heads = dict(at.rsplit("@", 1) for at in browser("document.getElementById('wall').dataset.heads").split())
    top, row = (float(browser(f"document.getElementById('wall').dataset.{name}")) for name in ("top", "row"))
    scale = box[2] / float(browser("document.getElementById('wall').viewBox.baseVal.width"))
    click_at(browser, box[0] + (float(heads["L1H4"]) + 2) * scale, box[1] + (top + 0.5 * row) * scale)
    assert browser("location.hash") == "#T01:L1H4"
    assert browser("document.getElementById('T01:L1H4').closest('details').open")
    browser("document.getElementById('wall').scrollIntoView({block: 'center'})")
    y = browser("document.getElementById('wall').getBoundingClientRect().top")
    click_at(browser, box[0] + (float(heads["L11H3"]) + 2) * scale, y + (top + 1.5 * row) * scale)
    assert browser("location.hash") == "#T01:L1H4", "T02 has no row there"


def test_what_is_filtered_stands_in_the_address(browser: Browser, page: Path) -> None:
    browser.open(page, "?verdict=SUPPORTED&head=L1H4&nonsense=1")
    shown = browser(SHOWN)
    assert shown == N_CLAIMS and browser("document.forms[0].elements.verdict.value") == "SUPPORTED"
    browser("(f => { f.elements.head.value = ''; f.dispatchEvent(new Event('input')); })(document.forms[0])")
    assert browser("location.hash") == "#?verdict=SUPPORTED"
    assert browser(SHOWN) > shown
    browser("document.forms[0].reset()")
    browser("new Promise(done => setTimeout(done, 50))")
    assert browser("location.hash") in ("", "#")
    browser("location.hash = 'T31:L1H4'")
    browser("new Promise(done => setTimeout(done, 50))")
    assert browser("location.hash") == "#T31:L1H4", "a row's address stays"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_first_screen_fits_a_telephone(browser: Browser, tmp_path: Path, scheme: str) -> None:
    ledger = large()
    before = ledger.model_copy(update={"verdicts": ledger.verdicts[40:]})
    file = tmp_path / "page.html"
    file.write_text(render(ledger, baseline=before), encoding="utf-8")
    browser.size(390, 844)
    browser.prefer(prefers_color_scheme=scheme)
    browser.open(file)
    assert browser("document.documentElement.scrollWidth") <= 390
    assert "no such row" in browser("document.querySelector('.first').textContent")
    assert browser("document.querySelector('.wall .scroll').scrollWidth") > 390, "the wall is moved in its own frame"


def test_nothing_is_clipped_on_a_telephone(browser: Browser, page: Path) -> None:
    browser.size(390, 1000)
    browser.open(page, "T01:L1H4")
    assert browser("document.documentElement.scrollWidth") <= 390
    wide = """(() => [...document.querySelectorAll('#T01 details[open] summary, #T01 details[open] svg, #T01 dt,'
      + ' #T01 details[open] .t, #T01 details[open] figcaption')].filter(e => e.checkVisibility())
      .map(e => [e.getBoundingClientRect().right, e.scrollWidth - e.clientWidth, e.outerHTML.slice(0, 80)])
      .filter(([right, over]) => right > 390 || over > 0))()"""
    assert browser(wide) == []
    assert browser("document.querySelectorAll('#T01 details[open] svg.map').length") == 1


def test_the_page_has_landmarks(browser: Browser, page: Path) -> None:
    browser.open(page)
    roles: dict[str, int] = {}
    for node in browser.call("Accessibility.getFullAXTree")["nodes"]:
        role = node.get("role", {}).get("value", "")
        roles[role] = roles.get(role, 0) + 1
    assert {"banner", "main", "navigation", "contentinfo", "search"} <= roles.keys()
    assert roles["main"] == 1
