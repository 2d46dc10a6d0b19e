"""The strongest channels without the rest: what is left out cannot be among them, and refusals come early."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest
import torch
from sae_lens import SAE

import fra
from fra.core import channels as module
from fra.core import reductions
from fra.core.reductions import Reduce
from fra.core.resolve import ResolvedHead
from fra.errors import FraError
from fra.tests.models import D_MODEL, build_sae, folder, random_tokens, tiny

HOOK = "blocks.1.ln1.hook_normalized"
KEY = ["q_feature", "k_feature"]


@cache
def wide() -> Any:
    """So many features that some are looked at before all others."""
    path: Path = build_sae("topk", D_MODEL, HOOK, folder() / "wide", d_sae=4096, k=96, dtype="float64")
    return SAE.load_from_disk(path)


@cache
def head(kind: str) -> ResolvedHead:
    return fra.resolve(tiny(kind, torch.float64), wide(), random_tokens(30), 1, 2)


@cache
def truth(kind: str, reduce: Reduce) -> pd.DataFrame:
    """Every single term, gathered by channel, strongest first."""
    h = head(kind)
    q, k = h.query.entries, h.key.entries
    terms = q.vector @ k.vector.mT
    at_q, at_k = h.frozen.mask[q.pos][:, k.pos].nonzero(as_tuple=True)
    rows = pd.DataFrame({"q_feature": q.feature[at_q], "k_feature": k.feature[at_k], "value": terms[at_q, at_k]})
    rows["value"] = rows["value"].abs() if reduce == "abs" else rows["value"]
    found = (
        rows.groupby(KEY)["value"].agg([{"abs": "sum"}.get(reduce, reduce), "count"]).set_axis(["value", "n"], axis=1)
    )
    found["size"] = found["value"].abs()
    return found.reset_index().sort_values(["size", *KEY], ascending=[False, True, True], ignore_index=True)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3"])
@pytest.mark.parametrize("reduce", get_args(Reduce))
def test_the_strongest_are_those_of_every_single_term(
    kind: str, reduce: Reduce, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAMPLED", 100)
    h, expected = head(kind), truth(kind, reduce)
    assert len(h.query.entries.live) >= 4 * module.SAMPLED
    for n in (1, 40):
        found = h.channels(reduce, n=n)
        assert found["value"].to_numpy() == pytest.approx(expected["value"][:n].to_numpy(), rel=1e-9)
        if reduce in ("sum", "abs", "max") or kind == "gpt2":
            of = expected.set_index(KEY)
            assert (found["count"].to_numpy() == of.loc[[*map(tuple, found[KEY].to_numpy())], "n"].to_numpy()).all()
    often = h.channels(reduce, n=9, min_count=20)
    assert (often["count"] >= 20).all()
    assert often["value"].to_numpy() == pytest.approx(expected[expected["n"] >= 20]["value"][:9].to_numpy(), rel=1e-9)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_most_is_never_computed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0
    value = module.ChannelTables.value

    def counting(self: Any, rows: slice, columns: slice, count: Any) -> Any:
        nonlocal seen
        seen += (rows.stop - rows.start) * (columns.stop - columns.start)
        return value(self, rows, columns, count)

    monkeypatch.setattr(module.ChannelTables, "value", counting)
    monkeypatch.setattr(reductions, "TILE_ELEMENTS", 1 << 15)
    h = head(kind)
    h.channels("sum", n=3)
    few, seen = seen, 0
    h.channels("sum")
    assert seen == len(h.query.entries.live) * len(h.key.entries.live)
    assert few < 0.4 * seen
    if kind == "gpt2":  # after the first look couplings bound the rest
        assert few <= module.SAMPLED**2


@pytest.mark.parametrize("reduce", ["sum", "abs", "mean"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "window"])
def test_channels_one_by_one_are_those_of_the_tables(reduce: Reduce, causal: bool) -> None:
    """And of the few that are left, none is missing that reaches the threshold."""
    h = head("gpt2")
    mask = h.frozen.mask if causal else h.frozen.mask & ~torch.ones_like(h.frozen.mask).tril(-7)
    tables = module.ChannelTables(h.query.entries, h.key.entries, mask, reduce)
    assert tables.closely_bounded
    rows, columns = slice(3, len(tables.q.live) // 2), slice(2, len(tables.k.live))
    count = tables.count(rows, columns)
    value = tables.value(rows, columns, count)
    threshold = float(value.abs().flatten().topk(60).values[-1])
    few = tables.strong(rows, columns, threshold)
    assert few is not None
    q_at, k_at = few
    assert len(q_at) < value.numel() // 8
    left = torch.zeros_like(value, dtype=torch.bool)
    left[q_at - rows.start, k_at - columns.start] = True
    assert not (value.abs() >= threshold)[~left].any()
    values, counts = tables.one_by_one(q_at, k_at)
    assert torch.equal(counts, count[left])
    assert values.numpy() == pytest.approx(value[left].numpy(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("reduce", ["sum", "abs"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "window"])
def test_sums_of_rotated_vectors_in_single_precision_miss_nothing(
    reduce: Reduce, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are off by less than they say, in blocks too, and what they leave is computed as the tables are."""
    monkeypatch.setattr(module, "SCREENED", 1 << 14)
    h = head("llama")
    mask = h.frozen.mask if causal else h.frozen.mask & ~torch.ones_like(h.frozen.mask).tril(-7)
    tables = module.ChannelTables(h.query.entries, h.key.entries, mask, reduce)
    assert tables.screened
    rows, columns = slice(3, len(tables.q.live) // 2), slice(2, len(tables.k.live))
    count = tables.count(rows, columns)
    value = tables.value(rows, columns, count)
    size, off = tables.rough(rows, columns)
    apart = float((size.double() - value.abs()).abs().max())
    assert 0 < apart < off < 1e-3 * float(value.abs().max())
    threshold = float(value.abs().flatten().topk(60).values[-1])
    few = tables.roughly_strong(rows, columns, threshold)
    assert few is not None
    q_at, k_at = few
    assert 60 <= len(q_at) < 80
    left = torch.zeros_like(value, dtype=torch.bool)
    left[q_at - rows.start, k_at - columns.start] = True
    assert not (value.abs() >= threshold)[~left].any()
    values, counts = tables.one_by_one(q_at, k_at)
    assert torch.equal(counts, count[left].to(counts))
    assert values.numpy() == pytest.approx(value[left].numpy(), rel=1e-9, abs=1e-12)


def test_a_refusal_comes_when_the_limit_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = 0
    count = module.ChannelTables.count

    def counting(self: Any, rows: slice, columns: slice) -> Any:
        nonlocal counted
        counted += rows.stop - rows.start
        return count(self, rows, columns)

    monkeypatch.setattr(module.ChannelTables, "count", counting)
    monkeypatch.setattr(reductions, "TILE_ELEMENTS", 1 << 15)
    monkeypatch.setattr(reductions, "memory_budget", lambda: 1 << 20)
    with pytest.raises(FraError, match=r"more than [0-9,]+ live channels would take .* pass n="):
        head("gpt2").channels()
    assert 0 < counted < 0.2 * len(head("gpt2").query.entries.live)
