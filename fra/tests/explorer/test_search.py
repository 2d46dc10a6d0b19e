"""The page's search against float64 brute force: `fra.resolve` at every cell, and activations from the model's own
hook.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fra
from fra.explorer import explore
from fra.tests.explorer.test_explorer import HOOK, TEXT, browsing
from fra.tests.models import tiny, tiny_sae
from fra.tests.report.browser import Browser

HEAD = 2
TOLERANCE = 1e-5
"""Relative; the page's numbers are float32."""

Terms = dict[tuple[int, int], list[float]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as made:
        yield made


class Truth:
    """All terms of a head's scores, in float64, cell by cell."""

    def __init__(self, target: Any) -> None:
        tokens = target.tokens(TEXT)
        m = fra.resolve(target.model, tiny_sae(HOOK, dtype="float64"), tokens, 1, HEAD)
        x = target.model.run_with_cache(tokens[None], names_filter=[HOOK])[1][HOOK][0]
        self.active = tiny_sae(HOOK, dtype="float64").encode(x).detach()
        self.mean = self.active.sum(0) / (self.active > 0).sum(0)
        self.cells = [(t, s, *m.pair(t, s)) for t, s in (m.scores() > -torch.inf).nonzero().tolist()]

    def terms(self, leave: set[int], typical: bool) -> Terms:
        """By channel: what it brings to each cell in which both its features are live."""
        found: Terms = {}
        for t, s, q, k, values in self.cells:
            if {t, s} & leave:
                continue
            if typical:
                values = values * (self.mean[q] / self.active[t, q])[:, None] * (self.mean[k] / self.active[s, k])
            for i, row in zip(q.tolist(), values.tolist(), strict=True):
                for j, value in zip(k.tolist(), row, strict=True):
                    found.setdefault((i, j), []).append(value)
        return found


SIZE = {"sum": sum, "mean": lambda v: sum(v) / len(v), "peak": lambda v: max(v, key=abs)}


@browsing
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_search_finds_the_strongest_of_all_channels(kind: str, browser: Browser, tmp_path: Path) -> None:
    target = fra.load(tiny(kind, torch.float64), tiny_sae(HOOK, dtype="float64"), [TEXT])
    file = tmp_path / "page.html"
    explore(target, TEXT, layer=1, precision="float32", documents=0, output=file)
    browser.open(file)
    brute = Truth(target)
    tokens = target.tokens(TEXT).tolist()
    marks = {t for t, token in enumerate(tokens) if not any(c.isalnum() for c in target.tokenizer.decode([token]))}
    bos = {t for t, token in enumerate(tokens) if token == target.tokenizer.bos_token_id}
    assert bos and marks - bos, "the text has what is filtered"
    for by, least, options in (
        ("sum", 1, ""),
        ("mean", 1, ""),
        ("mean", 3, ""),
        ("peak", 1, ""),
        ("peak", 2, "p"),
        ("sum", 1, "pbo"),
        ("mean", 2, "bt"),
        ("sum", 2, "ot"),
    ):
        left = (marks - bos if "p" in options else set()) | (bos if "b" in options else set())
        terms = brute.terms(left, "t" in options)
        truth = {
            channel: (SIZE[by](values), len(values))
            for channel, values in terms.items()
            if len(values) >= least and not ("o" in options and channel[0] == channel[1])
        }
        asked = {"by": by, "least": least}
        asked |= {
            name: key in options for name, key in zip(("punctuation", "bos", "own", "typical"), "pbot", strict=True)
        }
        found = browser(
            f"search(fra.head({HEAD}), {str(asked).replace('True', 'true').replace('False', 'false')}, () => true)"
        )
        assert len(found) == min(100, len(truth)) > 20, (by, options)
        order = sorted((abs(value) for value, _ in truth.values()), reverse=True)
        scale = max(abs(value) for values in terms.values() for value in values)
        for rank, one in enumerate(found):
            value, count = truth[one["i"], one["j"]]
            assert one["count"] == count
            assert one["value"] == pytest.approx(value, abs=TOLERANCE * scale * count)
            assert abs(one["value"]) == pytest.approx(order[rank], abs=TOLERANCE * scale * count), "none is missing"


@browsing
def test_the_view_shows_what_the_search_finds(browser: Browser, tmp_path: Path) -> None:
    target = fra.load(tiny("llama"), tiny_sae(HOOK), [TEXT])
    file = tmp_path / "page.html"
    explore(target, TEXT, layer=1, precision="float32", documents=0, output=file)
    browser.open(file, f"h={HEAD}&v=search&by=mean&least=2&punct=1&bos=1&own=1&typical=1")
    asked = "{by: 'mean', least: 2, punctuation: true, bos: true, own: true, typical: true}"
    look = "const look = () => document.querySelector('#panel table') ? done() : setTimeout(look, 20); look();"
    browser(f"new Promise((done) => {{ {look} }})")
    names = "[...document.querySelectorAll('#panel tbody tr')].map((row) => row.children[2].textContent)"
    found = browser(f"search(fra.head({HEAD}), {asked}, () => true)")
    assert browser(names) == [f"{one['i']} → {one['j']}" for one in found]
    browser("document.querySelector('#panel tbody tr button').click()")
    assert browser("location.hash").startswith("#h=2&v=pair")
    assert browser("state.c") == f"{found[0]['i']}-{found[0]['j']}"
