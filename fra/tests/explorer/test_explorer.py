"""The explorer's page in a real browser: its numbers are those of `fra.resolve`, on random cells, with rotary
positions, grouped keys, a softcap and a sliding window; tokens stay text; its policy lets nothing else in.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fra
from fra.errors import FraError
from fra.explorer import explore
from fra.tests.core.test_resolve_architectures import absolute_terms
from fra.tests.models import tiny, tiny_sae
from fra.tests.report.browser import Browser, installed

TEXT = "one and two make more than one, said three. </script><b>four"
HOOK = "blocks.1.hook_resid_pre"
TOLERANCE = {"float16": 1e-3, "float32": 1e-6}

browsing = pytest.mark.skipif(installed() is None, reason="there is no Chromium on this machine")


def target_of(kind: str) -> Any:
    return fra.load(tiny(kind), tiny_sae(HOOK), [TEXT])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as made:
        yield made


@browsing
@pytest.mark.parametrize("precision", ["float16", "float32"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_numbers_are_those_of_resolve(kind: str, precision: Any, browser: Browser, tmp_path: Path) -> None:
    target, file = target_of(kind), tmp_path / "page.html"
    explore(target, TEXT, layer=1, precision=precision, documents=0, output=file)
    browser.open(file)
    browser("window.all = (pairs) => [...pairs.values.keys()].map((at) => pairs.one(at))")
    tokens, rng = target.tokens(TEXT), np.random.default_rng(0)
    for head in range(4):
        m = fra.resolve(target.model, tiny_sae(HOOK), tokens, 1, head)
        scores, terms = m.scores(), absolute_terms(m)
        pattern = m.frozen.attention(scores)
        blocks = m.blocks()
        cells = (scores > -np.inf).nonzero().tolist()
        for t, s in [cells[n] for n in rng.choice(len(cells), 6, replace=False)]:
            bar = TOLERANCE[precision] * float(terms[t, s])
            at = t * len(tokens) + s
            assert abs(browser(f"fra.head({head}).scores[{at}]") - float(scores[t, s])) <= bar
            shown = browser(f"fra.head({head}).blocks({t}, {s})")
            for a, line in zip(("feature", "bias", "error"), shown, strict=True):
                for b, value in zip(("feature", "bias", "error"), line, strict=True):
                    assert abs(value - float(blocks[a, b][t, s])) <= bar
            q, k, values = m.pair(t, s)
            pairs = browser(f"all(fra.head({head}).pairs({t}, {s}, 'nothing', false))")
            assert len(pairs) == values.numel()
            truth = {(i, j): float(values[x, y]) for x, i in enumerate(q.tolist()) for y, j in enumerate(k.tolist())}
            for pair in pairs:
                assert abs(pair["value"] - truth[pair["i"], pair["j"]]) <= bar
            keys = [k for k in range(len(tokens)) if scores[t, k] > -np.inf]
            other = int(keys[rng.integers(len(keys))])
            for less, against in (("'row'", keys), (str(other), [other])):
                own: dict[tuple[int, int], float] = dict(truth)
                for key in against:
                    rows, columns, there = m.pair(t, key)
                    for (x, i), (y, j) in product(enumerate(rows.tolist()), enumerate(columns.tolist())):
                        own[i, j] = own.get((i, j), 0.0) - float(there[x, y]) / len(against)
                shown_pairs = browser(f"all(fra.head({head}).pairs({t}, {s}, {less}, false))")
                assert {(pair["i"], pair["j"]) for pair in shown_pairs} == own.keys()
                largest = max(float(terms[t, key]) for key in [s, *against])
                for pair in shown_pairs:
                    assert abs(pair["value"] - own[pair["i"], pair["j"]]) <= TOLERANCE[precision] * largest
                    assert pair["here"] == (pair["j"] in k.tolist())
                for sign in (1, -1):
                    best = sorted((pair["value"] for pair in shown_pairs), key=lambda x, sign=sign: -sign * x)[:5]
                    pull = browser(f"fra.head({head}).pairs({t}, {s}, {less}, false).strongest(5, {sign})")
                    assert [pair["value"] for pair in pull] == [x for x in best if sign * x > 0]
            assert abs(browser(f"fra.head({head}).pattern[{at}]") - float(pattern[t, s])) <= 1e-5
            i, j = int(q[0]), int(k[0])
            channel = m.channel(i, j)
            changed = m.frozen.attention(scores - channel)
            without = browser(f"fra.head({head}).attention(fra.head({head}).changed([{{i:{i},j:{j},factor:0}}]))[{at}]")
            assert abs(without - float(changed[t, s])) <= max(1e-5, bar)
            assert float(channel[t, s]) != 0


@browsing
def test_tokens_are_text_and_the_policy_is_strict(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    page = explore(target_of("llama"), TEXT, heads=["L1H2"], documents=0, output=file)
    assert "unsafe" not in page
    browser.open(file, "h=2&v=row")
    assert browser("document.querySelectorAll('main b').length") > 0
    assert not browser("[...document.querySelectorAll('b')].some((b) => b.textContent.includes('four'))")
    assert browser("document.querySelector('#tabs [aria-current]').textContent") == "Row"


@browsing
def test_the_address_keeps_the_view_and_keys_move(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    explore(target_of("gpt2"), TEXT, layer=1, documents=0, output=file)
    browser.open(file, "h=2&q=5&k=3")
    browser("document.getElementById('pattern').focus()")
    browser.press("ArrowLeft", 37)
    assert "k=2" in browser("location.hash")
    browser.press("4", 52)
    assert "v=search" in browser("location.hash")
    browser.size(390, 900)
    assert browser("document.documentElement.scrollWidth") <= 390
    browser.size(1400, 1000)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": ["L1H1", "L0H1"]}, "several layers"),
        ({"heads": ["L1H9"]}, "no head L1H9"),
        ({"precision": "float8"}, "precision"),
        ({"documents": -1}, "negative"),
    ],
)
def test_bad_input_is_one_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises(FraError, match=said):
        explore(target_of("gpt2"), TEXT, **options)


def test_no_text_steers_the_page(tmp_path: Path) -> None:
    """No token holds a character that a page obeys."""
    steering, file = "\x00\x07\u061c\u202a\u202e\u2066\u2069", tmp_path / "page.html"
    explore(target_of("gpt2"), TEXT + steering, heads=["L1H0"], documents=0, output=file)
    assert not set(steering) & set(file.read_text(encoding="utf-8"))
