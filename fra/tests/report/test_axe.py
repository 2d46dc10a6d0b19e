"""axe-core, which runs the accessibility rules that a machine can decide, finds nothing serious on any page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

import axe_core_python
import pytest

import fra
from fra import cards
from fra.explorer import explore
from fra.ledgers.matrix import matrix, named
from fra.report import compared
from fra.report.card_pages import write_pages
from fra.report.page import render
from fra.tests.explorer.test_explorer import HOOK, TEXT
from fra.tests.ledgers.test_matrix import three
from fra.tests.models import tiny, tiny_sae
from fra.tests.report.browser import Browser, installed
from fra.tests.report.test_report import full_ledger

pytestmark = pytest.mark.skipif(installed() is None, reason="there is no Chromium on this machine")
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]
SCREENS = [("light", 1400), ("dark", 1400), ("light", 390)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as made:
        yield made


def serious(browser: Browser) -> list[str]:
    """What axe calls serious or critical: rule and elements."""
    if not browser("'axe' in window"):
        browser(resources.files(axe_core_python).joinpath("axe.min.js").read_text(encoding="utf-8"))
    options = json.dumps({"runOnly": RULES, "resultTypes": ["violations"]})
    found = browser(f"axe.run(document, {options})")
    assert len(found["passes"]) > 10, "the rules ran"
    return [
        f"{one['id']} ({one['impact']}): {', '.join(node['html'][:160] for node in one['nodes'][:4])}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]


def check(browser: Browser, file: Path, addresses: Sequence[str] = ("",), before: str = "") -> None:
    """Every address on a wide screen, the first in the dark and on a telephone, too."""
    for scheme, width in SCREENS:
        browser.size(width, 1000)
        browser.prefer(prefers_color_scheme=scheme)
        for address in addresses if (scheme, width) == SCREENS[0] else addresses[:1]:
            browser.open(file, address)
            browser(f"{before}; new Promise((done) => setTimeout(done, 100))")
            assert serious(browser) == [], (file.name, address, scheme, width)


OPEN = "for (const details of document.querySelectorAll('details')) details.open = true"


def test_the_explorer(browser: Browser, tmp_path: Path) -> None:
    sae = [tiny_sae(HOOK), tiny_sae("blocks.1.attn.hook_z")]
    target, file = fra.load(tiny("llama"), sae, [TEXT, TEXT[::-1]]), tmp_path / "explorer.html"
    explore(target, TEXT, layer=1, output=file)
    browser.open(file, "h=1&q=9&k=4")
    i, j = browser("(({ i, j }) => [i, j])(fra.head(1).pairs(9, 4, 'row', false).one(0))")
    views = [f"h=1&q=9&k=4&w={i}-{j}x0&v={view}" for view in ("cell", "row", "search", "what", "output")]
    feature = browser("fra.about.outputs.features[0]")
    check(browser, file, [*views, f"v=pair&c={i}-{j}", f"v=feature&f=in{i}", f"v=feature&f=out{feature}"], OPEN)


def test_the_report(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    ledger = full_ledger()
    file.write_text(render(ledger, baseline=three()[0]), encoding="utf-8")
    check(browser, file, ["T01:L0H0"], OPEN)


def test_the_cards(browser: Browser, tmp_path: Path) -> None:
    hook = "blocks.1.attn.hook_z"
    target = fra.load(tiny("llama"), [tiny_sae(hook)], [TEXT, TEXT[::-1]])
    made = cards.cards(target, hook, n_documents=2)
    write_pages(made, tmp_path, "tiny", hook, 1, 96, fingerprint=target.fingerprint())
    check(browser, tmp_path / "L1H0.html")
    browser.open(tmp_path / "index.html")
    assert serious(browser) == []


def test_the_comparison(browser: Browser, tmp_path: Path) -> None:
    many = three()
    file = tmp_path / "compared.html"
    names = named(many, ["a", "b", "c"])
    page = compared.render(matrix(many, names), many, ["a", "b", "c"], {names[1]: ["another text"]})
    file.write_text(page, encoding="utf-8")
    check(browser, file, before=OPEN)


def test_what_is_wrong_is_found(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "bad.html"
    file.write_text("<!doctype html><html lang='en'><title>x</title><main><h1>x</h1><button></button></main>")
    browser.open(file)
    found = "axe.run(document, {runOnly: ['button-name']}).then((found) => found.violations.map((one) => one.impact))"
    browser(resources.files(axe_core_python).joinpath("axe.min.js").read_text(encoding="utf-8"))
    assert browser(found) == ["critical"]
