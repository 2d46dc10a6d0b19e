"""Pairs of features on natural text: tables and lists against loops, planted heads against their claims, and choices
that do not depend on what is measured.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats as sps

from fra.claim import Outcome, judge
from fra.core.coded import Arm, measure_arm
from fra.errors import CannotLoad
from fra.measures.pairs import activity as activity_module
from fra.measures.pairs import q09_self_channels, q10_prediction, q11_stability, relabelling
from fra.measures.pairs.activity import OnText, PairSelection, live_features, top
from fra.measures.pairs.designs import PairPredictions, PairTexts, SelfChannels, Stability
from fra.measures.pairs.layers import MEASURED, SELECTION, PairLayer, PairLayers, pair_texts
from fra.measures.scores import layer as carried
from fra.measures.scores import q22_swaps
from fra.stimuli import natural as natural_module
from fra.stimuli import repeated, sets
from fra.stimuli.designs import RepeatedSets
from fra.stimuli.padding import Texts
from fra.targets.target import load_target
from fra.tests import circuit, models
from fra.tests.claims import claim
from fra.tests.models import tiny_sae
from fra.verdicts.stats import by_source

N = 48
HOOK = "blocks.1.hook_resid_pre"
TEXTS = PairTexts()
SELF, STABLE, PREDICT = (claim(name) for name in ("Q09", "Q11", "Q10"))


def some_text(first: int, n: int = N, length: int = 26, a_source: int = 1) -> Texts:
    """Random tokens of two lengths, padded."""
    documents = [models.random_tokens(length - 3 * (k % 3 == 0), first + k) for k in range(n)]
    return Texts.of(documents, [f"source {(first + k) // a_source}" for k in range(n)])


def measured_arm(kind: str, texts: Texts) -> Arm:
    sae = tiny_sae(HOOK, dtype="float64")
    return measure_arm(models.tiny(kind, torch.float64), sae, texts.tokens, 1, HOOK)


@cache
def layer(kind: str, measured: int = 1000, chosen: int = 0, a_source: int = 1) -> PairLayer:
    """A layer of a tiny model on random documents, numbered from `measured` and `chosen` on."""
    both = {MEASURED: some_text(measured, a_source=a_source), SELECTION: some_text(chosen)}
    return PairLayer({name: measured_arm(kind, own) for name, own in both.items()}, both, TEXTS, ("test",))


class Made(PairLayers):
    """Layers that a test made."""

    def __init__(self, layers: dict[int, PairLayer | str], n_heads: int) -> None:
        self.target: Any = SimpleNamespace(name="made")
        self._layers, self.n_heads = layers, n_heads

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __getitem__(self, layer: int) -> PairLayer | str:
        return self._layers[layer]

    def picture(self, head: str, pair: Any) -> dict[str, Any]:
        return {}


def codes_of(on: OnText) -> torch.Tensor:
    """[documents, positions, live] coefficients, the first position and padding out."""
    dense = (on.arm.codes.dense() / on.arm.frozen.sigma[..., None])[..., on.live].clone()
    dense[:, 0] = 0
    for d, length in enumerate(on.texts.lengths):
        dense[d, length:] = 0
    return dense


def test_tables_are_sums_over_earlier_positions_of_real_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    own = layer("gpt2").selection
    codes, n = codes_of(own.on), len(own.live)
    rng = np.random.default_rng(0)
    for i, j in [*rng.integers(0, n, (12, 2)).tolist(), [3, 3]]:
        expected = np.zeros(3)
        for d, length in enumerate(own.on.texts.lengths):
            live = [v for t in range(1, length) for s in range(1, t) if (v := float(codes[d, t, i] * codes[d, s, j]))]
            expected += (sum(live), len(live), bool(live))
        np.testing.assert_allclose(own.tables[:, i, j].tolist(), expected, rtol=1e-5)
    arm, texts = own.arm, own.on.texts
    alone = PairSelection.of(arm, texts, TEXTS, TEXTS.live_in)
    torch.testing.assert_close(alone.tables, own.tables)
    assert alone.live.tolist() == own.live.tolist() == live_features(arm, texts, TEXTS.live_in).tolist()
    assert own.frequency.tolist() == (codes != 0).sum((0, 1)).tolist()
    monkeypatch.setattr(activity_module, "TABLE_CELLS", n * n)  # too few for all documents at once
    torch.testing.assert_close(PairSelection.of(arm, texts, TEXTS, TEXTS.live_in).tables, own.tables)


def test_top_is_what_sorting_says() -> None:
    values = torch.rand(300, 300, generator=torch.Generator().manual_seed(0))
    assert top(values, 50).tolist() == values.flatten().argsort(descending=True)[:50].tolist()
    assert len(top(torch.zeros(0, 0), 3)) == 0


def by_hand(own: PairLayer, head: int, label: torch.Tensor | None = None) -> np.ndarray:
    """Share of i = j among the fifty strongest of every measured document, from dense codes."""
    U, V = own.selection.couplings(head)
    G = (U @ (V if label is None else V[label]).T).abs()
    found = []
    for dense in codes_of(own.on):
        here = torch.nonzero((dense != 0).any(0))[:, 0]
        before = dense.cumsum(0) - dense
        value = ((dense.T @ before).abs() * G)[here][:, here].flatten()
        best = value.argsort(descending=True)[:50]
        found.append(float((best // len(here) == best % len(here)).double().mean()))
    return np.array(found)


def test_shares_of_self_channels_are_those_of_an_enumeration() -> None:
    own = layer("gpt2")
    found = q09_self_channels.self_shares(own, SelfChannels())
    np.testing.assert_allclose(found.own[:, 2], by_hand(own, 2))
    label = own.selection.relabelled(own.rng("self", "labels of document 7"), 64)
    assert found.relabelled[7, 2] == by_hand(own, 2, label)[7]
    assert sorted(label.tolist()) == list(range(len(label))) and label.tolist() != sorted(label.tolist())
    for part in own.selection.bins(64):
        assert set(label[part].tolist()) == set(part.tolist()), "labels stay among features of like frequency"
    ordered = [own.selection.frequency[part] for part in own.selection.bins(16)]
    assert all(a.max() <= b.min() for a, b in itertools.pairwise(ordered)) and ordered[0].min() < ordered[-1].max()
    several = [own.selection.relabelled(own.rng("self", f"labels of document {d}"), 64).tolist() for d in range(3)]
    assert several[0] != several[1] != several[2], "every document has a draw of its own"


@pytest.mark.parametrize("cells", [60, 4_096])
def test_bounded_cells_give_the_strongest_of_any_relabelling(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With so few cells that documents have to be gone through, and with enough."""
    monkeypatch.setattr(relabelling, "CELLS", cells)
    own = layer("gpt2")
    null = q09_self_channels.SelfRelabellings(own, 1, SelfChannels())
    for k in range(3):
        label = own.selection.relabelled(own.rng("self", "head 1", f"draw {k}"), 64)
        assert null.draw(k) == pytest.approx(by_hand(own, 1, label)[own.some(40)].mean())
    assert len(set(own.some(40))) == 40 and own.some(99) == list(range(N))
    assert null.draw(0) != null.draw(1)


def list_by_hand(own: PairLayer, selection: PairSelection, head: int, least: int) -> set[tuple[int, int]]:
    codes = codes_of(selection.on)
    U, V = selection.couplings(head)
    products = torch.zeros(3, len(U), len(U), dtype=torch.float64)
    for dense in codes.double():
        live = (dense != 0).double()
        count = live.T @ (live.cumsum(0) - live)
        products += torch.stack([dense.T @ (dense.cumsum(0) - dense), count, (count > 0).double()])
    value = (products[0] / products[1].clamp(min=1)).abs() * (U @ V.T).abs()
    value[products[2] < least] = -1
    best = value.flatten().argsort(descending=True)[:50].tolist()
    return {divmod(b, len(U)) for b in best if value.flatten()[b] >= 0}


def test_lists_and_their_overlaps_are_those_of_an_enumeration() -> None:
    own, head = layer("gpt2"), 2
    found = q11_stability.lists_again(own, Stability())
    assert isinstance(own.every, PairSelection) and len(own.every.live) > len(own.selection.live), (
        "no feature is rare here"
    )
    on = own.seen(own.every)
    U, V = own.every.couplings(head)
    for least, table in ((TEXTS.together_in, found.own), (1, found.loose)):
        chosen = list_by_hand(own, own.every, head, least)
        kind = q11_stability.Lists(own.every, [head], least, 50)
        assert {tuple(p) for p in kind.pairs[0].tolist()} == chosen
        may = own.every.tables[2] >= least
        for d in (0, 7, 30):
            dense = codes_of(on)[d]
            live = (dense != 0).to(dense)
            count = live.T @ (live.cumsum(0) - live)
            value = (dense.T @ (dense.cumsum(0) - dense) / count.clamp(min=1)).abs() * (U @ V.T).abs() * may
            here = {(i, j) for i, j in chosen if count[i, j] > 0}
            best = {divmod(b, len(U)) for b in value.flatten().argsort(descending=True)[: len(here)].tolist()}
            expected = len(here & best) / len(here | best) if here else np.nan
            assert table[d, head] == pytest.approx(expected, nan_ok=True)
    # a relabelling that changes nothing leaves the overlap; others are near enumeration by renaming the codes
    null = q11_stability.ListRelabellings(own, head, Stability(), found.lists)
    same = torch.arange(len(own.every.live))
    assert null.jaccard(same) == pytest.approx(np.nanmean(found.own[own.some(40), head]))
    label = own.every.relabelled(own.rng("x"), 64)
    dense, may = codes_of(on), found.lists.may
    indices = []
    for d in own.some(40):
        keys = torch.zeros_like(dense[d])
        keys[:, label] = dense[d]
        live, seen = (dense[d] != 0).to(keys), (keys != 0).to(keys)
        count = live.T @ (seen.cumsum(0) - seen)
        value = (dense[d].T @ (keys.cumsum(0) - keys) / count.clamp(min=1)).abs() * (U @ V.T).abs() * may
        here = {(i, j) for i, j in map(tuple, found.lists.pairs[head].tolist()) if count[i, j] > 0}
        best = {divmod(b, len(U)) for b in value.flatten().argsort(descending=True)[: len(here)].tolist()}
        indices += [len(here & best) / len(here | best)] if here else []
    assert null.jaccard(label) == pytest.approx(np.mean(indices))


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "pythia"])
def test_the_correlation_is_that_of_a_softmax_without_the_channel(kind: str) -> None:
    own, head = layer(kind), 1  # gemma2 caps its scores, rotates and has a window; pythia rotates
    joint = q10_prediction.joint_terms(own, PairPredictions())
    frozen, codes = own.on.arm.frozen, own.on.arm.codes.dense() / own.on.arm.frozen.sigma[..., None]
    U, V = own.on.arm.couplings(head)
    pos, scores = codes.shape[1], frozen.scores(head)
    G, ratio = [], []
    for i, j in joint.pairs[:25].tolist():
        looked = even = weighted = 0.0
        for d, length in enumerate(own.on.texts.lengths):
            a, b = codes[d, :, i].clone(), codes[d, :, j].clone()
            for side in (a, b):
                side[0], side[length:] = 0.0, 0.0
            at = torch.arange(pos)
            u, v = U[i].expand(pos, -1), V[j].expand(pos, -1)
            if frozen.rotary is not None:
                u, v = frozen.rotary.rotate(u, at), frozen.rotary.rotate(v, at)
            F = (a[:, None] * b) * (u @ v.T) * frozen.mask
            A = frozen.cap(scores[d] - F).masked_fill(~frozen.mask, -torch.inf).softmax(-1)
            product = (a[:, None] * b) * frozen.mask
            uniform = 1 / frozen.mask.sum(-1, keepdim=True)
            looked, even = looked + float((A * product).sum()), even + float((uniform * product).sum())
            weighted += float((uniform * F).sum())
        G.append(weighted / even)
        ratio.append(np.log(looked / even))
    again = q10_prediction.prediction_of(own, restricted(joint, joint.pair < 25, 25), head)
    assert again.correlation.estimate == pytest.approx(sps.spearmanr(G, ratio).statistic, abs=1e-6)
    low, high = np.quantile(ratio, [0.25, 0.75])
    assert again.spread.estimate == pytest.approx(high - low, rel=1e-5)
    whole = q10_prediction.prediction_of(own, joint, head)
    assert abs(np.mean([whole.draw(k) for k in range(200)])) < 0.2
    assert whole.draw(3) == q10_prediction.prediction_of(own, joint, head).draw(3) != whole.draw(103)


def restricted(joint: q10_prediction.Joint, kept: torch.Tensor, n: int | None = None) -> q10_prediction.Joint:
    """Some of the terms, of the first n pairs."""
    terms = {name: getattr(joint, name)[kept] for name in ("pair", "source", "row_q", "row_k", "product")}
    group = torch.unique(joint.group[kept], return_inverse=True)[1]
    pairs = {name: getattr(joint, name)[:n] for name in ("pairs", "matched", "part")}
    return dataclasses.replace(joint, group=group, **pairs, **terms)


def test_without_a_source_neither_its_documents_nor_its_pairs_count() -> None:
    own = layer("gpt2", a_source=2)
    joint = q10_prediction.joint_terms(own, PairPredictions(live_in=12))
    found = q10_prediction.prediction_of(own, joint, 1)
    n = len(joint.sources)
    assert n == N // 2 and len(found.correlation.left_out) == n
    assert np.ptp(np.bincount(joint.part, minlength=n)) <= 1
    without = restricted(joint, (joint.source != 3))
    every = q10_prediction.prediction_of(own, without, 1)
    rest = torch.from_numpy(np.flatnonzero(joint.part != 3))
    kept = torch.isin(without.pair, rest)
    terms = {name: getattr(without, name)[kept] for name in ("source", "row_q", "row_k", "product")}
    fewer = dataclasses.replace(
        without,
        pairs=without.pairs[rest],
        pair=torch.searchsorted(rest, without.pair[kept]),
        group=torch.unique(without.group[kept], return_inverse=True)[1],
        matched=without.matched[rest],
        part=without.part[rest],
        **terms,
    )
    # the jackknife computes attention without the channel once: on the kept pairs nothing else changes
    both = q10_prediction.prediction_of(own, fewer, 1)
    assert found.correlation.left_out[3] == pytest.approx(both.correlation.estimate)
    assert found.spread.left_out[3] == pytest.approx(both.spread.estimate)
    assert every.correlation.estimate != pytest.approx(both.correlation.estimate)


def test_pseudo_values_of_a_mean_are_the_values() -> None:
    values = np.random.default_rng(0).normal(0.3, 1.0, 20)
    own = q10_prediction.Jackknife(values.mean(), np.array([np.delete(values, k).mean() for k in range(20)]))
    np.testing.assert_allclose(own.pseudo_values, values)


def test_permutations_stay_within_matched_groups() -> None:
    """Couplings that are equal within groups: no permutation within them changes anything."""
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat(np.arange(20), 10))
    G, ratio = group.astype(float), group + rng.normal(0, 3.0, 200)
    null = q10_prediction.Permutations(G, ratio, group, layer("gpt2"), 0)
    assert [null.draw(k) for k in (0, 5, 150)] == pytest.approx([sps.spearmanr(G, ratio).statistic] * 3)
    other = q10_prediction.Permutations(rng.normal(size=200), ratio, group, layer("gpt2"), 0)
    assert np.std([other.draw(k) for k in range(50)]) > 0.01
    shared = rng.random((400, 3))
    sizes = np.bincount(q10_prediction.groups(shared, 10))
    assert sizes.min() >= 9 and sizes.max() <= 11
    fifth = np.argsort(np.argsort(shared[:, 0])) // 80
    for g in range(len(sizes)):
        assert len(set(fifth[q10_prediction.groups(shared, 10) == g])) == 1


def test_what_is_chosen_does_not_depend_on_what_is_measured() -> None:
    """Measured documents exchanged: lists, pairs, groups of matched pairs, features and bins are the same to the bit;
    with other selection documents they are not.
    """

    def chosen(own: PairLayer) -> list[Any]:
        lists = q11_stability.lists_again(own, Stability()).lists
        pairs, matched = q10_prediction.chosen_pairs(own, PairPredictions())
        listed = q09_self_channels.self_shares(own, SelfChannels()).listed
        parts = [*(p.tolist() for p in lists.pairs), pairs.tolist(), matched.tolist(), list(listed)]
        return [*parts, own.on.live.tolist(), [b.tolist() for b in own.selection.bins(64)]]

    one, exchanged, other = layer("gpt2"), layer("gpt2", measured=5000), layer("gpt2", chosen=7000)
    assert chosen(one) == chosen(exchanged)
    assert all(a != b for a, b in zip(chosen(one)[:6], chosen(other)[:6], strict=True))
    shares = [q09_self_channels.self_shares(own, SelfChannels()).own for own in (one, exchanged)]
    assert not np.array_equal(*shares)


def test_no_source_is_both_chosen_on_and_measured() -> None:
    found = pair_texts(load_target("mini"), TEXTS)
    assert {name: len(set(own.sources)) for name, own in found.items()} == {MEASURED: 120, SELECTION: 120}
    assert not set(found[MEASURED].sources) & set(found[SELECTION].sources)
    assert max(found[MEASURED].lengths) == TEXTS.longest


# A planted head on a one-hot dictionary: what it reads is written down.


def written(coupling: torch.Tensor, strengths: tuple[int, int] | None = None) -> Made:
    """The circuit's head with `coupling` between tokens, on texts of twenty tokens. strengths: seeds of how strongly
    each feature is live on selection and measured documents; all alike where None.
    """
    rng = np.random.default_rng(0)
    model, sae = circuit.model(), circuit.dictionary()
    arms, both = {}, {}
    for name, n in ((SELECTION, 60), (MEASURED, 120)):
        texts = rng.integers(0, 20, (n, circuit.N_CTX))
        texts[:, 0] = circuit.BOS
        both[name] = Texts.of([torch.from_numpy(row) for row in texts], [f"{name} {k}" for k in range(n)])
        arm = measure_arm(model, sae, both[name].tokens, 1, circuit.HOOK)
        if strengths is not None:
            generator = torch.Generator().manual_seed(strengths[name == MEASURED])
            strength = torch.randn(len(arm.codes.decoder), generator=generator).exp()
            arm = Arm(arm.frozen, dataclasses.replace(arm.codes, value=arm.codes.value * strength[arm.codes.feature]))
        W_q, W_k = arm.frozen.W_q.clone(), arm.frozen.W_k.clone()
        W_q[1], W_k[1] = 0.0, 0.0
        W_q[1, : circuit.D_VOCAB] = coupling / arm.frozen.scale
        W_k[1, : circuit.D_VOCAB] = torch.eye(circuit.D_VOCAB)
        frozen = dataclasses.replace(arm.frozen, W_q=W_q, W_k=W_k)
        pattern = frozen.pattern.clone()
        pattern[:, 1] = frozen.scores(1).softmax(-1)
        arms[name] = Arm(dataclasses.replace(frozen, pattern=pattern), arm.codes)
    return Made({1: PairLayer(arms, both, TEXTS, ("planted",))}, arms[MEASURED].frozen.n_heads)


@cache
def planted(name: str) -> Made:
    tokens = circuit.D_VOCAB
    rng = torch.Generator().manual_seed(1)
    one, noise = torch.eye(tokens), torch.randn(tokens, tokens, generator=rng)
    return {
        "self": lambda: written(3.0 * one + 0.01 * noise),
        "next": lambda: written(3.0 * one.roll(1, 1) + 0.01 * noise),
        "random": lambda: written(noise),
        "strong": lambda: written(noise, (5, 5)),
        "moved": lambda: written(noise, (5, 6)),
    }[name]()


def verdict(statistic: Callable[..., Any], of: Any, name: str, head: str = "L1H1") -> Any:
    return judge(of, statistic(of, planted(name))[head])


def test_self_channels_are_found_where_they_were_planted_and_nowhere_else() -> None:
    assert verdict(q09_self_channels.self_channels, SELF, "self").outcome is Outcome.SUPPORTED
    assert verdict(q09_self_channels.self_channels, SELF, "next").outcome is Outcome.REFUTED
    assert verdict(q09_self_channels.self_channels, SELF, "random").outcome is Outcome.REFUTED


def test_lists_come_up_again_where_text_is_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    def atoms(value: float) -> Callable[..., np.ndarray]:
        def found(layer: PairLayer, design: Stability, heads: list[int]) -> np.ndarray:
            asked.append(heads)
            return np.full((len(layer.on.texts), len(heads)), value)

        return found

    monkeypatch.setattr(q11_stability, "of_random_atoms", atoms(0.1))
    stable = verdict(q11_stability.stability, STABLE, "strong")
    assert stable.outcome is Outcome.SUPPORTED, stable.reason
    assert 1 in asked[0], "drawn for a head that passes the rest"
    over = {c.name: c for c in next(iter(stable.evidence.candidates.values()))}
    assert over["over random atoms"].effect == pytest.approx(over["Jaccard of the list"].effect - 0.1)
    # random atoms come up again as often: features do nothing
    monkeypatch.setattr(q11_stability, "of_random_atoms", atoms(0.99))
    denied = verdict(q11_stability.stability, STABLE, "strong")
    assert denied.outcome is not Outcome.SUPPORTED
    assert denied.decided is not None and denied.decided.name == "over random atoms"


def test_every_part_of_the_sources_has_a_dictionary_of_its_own() -> None:
    own, design = layer("gpt2", a_source=2), Stability(dictionaries=3)
    parts = q11_stability.parts_of(own, 3)
    assert np.bincount(parts).tolist() == [16, 16, 16]
    assert all(len(set(parts[np.array(own.sources) == s])) == 1 for s in own.sources)
    every = np.ones(N, dtype=bool)
    whole = [q11_stability.of_dictionary(own, design, k, [0, 2], every) for k in range(3)]
    found = q11_stability.of_random_atoms(own, design, [0, 2])
    for k in range(3):
        assert np.array_equal(found[parts == k], whole[k][parts == k], equal_nan=True)
    assert not np.array_equal(whole[0], whole[1], equal_nan=True) and np.isfinite(found).any()


def test_where_activity_changes_lists_do_not_come_up_again() -> None:
    """The same couplings, and features that are live with other strengths on the measured documents."""
    assert verdict(q11_stability.stability, STABLE, "moved").outcome is Outcome.REFUTED


def test_a_channel_does_not_vouch_for_itself() -> None:
    """One-hot features: without a channel nothing of its coupling is left, and weights foretell nothing."""
    own = planted("random").of("L1H1")
    found = q10_prediction.prediction_of(own, q10_prediction.joint_terms(own, PairPredictions()), 1)
    assert abs(found.correlation.estimate) < 0.3
    assert verdict(q10_prediction.prediction, PREDICT, "random").outcome is not Outcome.SUPPORTED


def test_documents_of_one_source_are_one_cluster() -> None:
    """Two documents a source: evidence rests on half as many, and their sums go together."""
    own = layer("gpt2", a_source=2)
    few = dataclasses.replace(SELF, min_sources=2)
    found = q09_self_channels.self_channels(few, Made({1: own}, own.n_heads))["L1H0"]
    assert found.n == N // 2
    shares = q09_self_channels.self_shares(own, SelfChannels())
    excess = by_source(shares.own[:, 0] - shares.relabelled[:, 0], own.sources) / 2
    (conditions,) = found.candidates.values()
    assert conditions[0].effect == pytest.approx(excess.mean())


def outcomes(layers: Made) -> dict[str, dict[str, Any]]:
    """By claim, the verdict at every head."""
    return {
        of.id: {h: judge(of, e) for h, e in statistic(of, layers).items()}
        for statistic, of in (
            (q09_self_channels.self_channels, SELF),
            (q10_prediction.prediction, PREDICT),
            (q11_stability.stability, STABLE),
        )
    }


def test_rotary_heads_are_left_out_of_the_lists_and_not_of_the_correlation() -> None:
    own = layer("pythia")
    found = outcomes(Made({1: own}, own.n_heads))
    assert {v.outcome for name in ("Q09", "Q11") for v in found[name].values()} == {Outcome.CANNOT_RUN}
    assert Outcome.CANNOT_RUN not in {v.outcome for v in found["Q10"].values()}


def test_a_layer_with_too_few_live_pairs_cannot_run_and_says_so() -> None:
    both = {name: some_text(k, 16) for k, name in ((0, MEASURED), (500, SELECTION))}  # none is live in 20 of 16
    arms = {name: measured_arm("gpt2", own) for name, own in both.items()}
    with pytest.raises(CannotLoad, match="only 0 pairs of features of layer 1 are jointly live in 20 documents"):
        PairLayer(arms, both, TEXTS, ("test",))
    for verdicts in outcomes(Made({0: "only 0 pairs"}, 2)).values():
        assert {v.outcome for v in verdicts.values()} == {Outcome.CANNOT_RUN} and len(verdicts) == 2


def test_a_layer_with_too_many_live_features_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    own = layer("gpt2")
    assert isinstance(own.every, PairSelection)
    monkeypatch.setattr(activity_module, "TABLE_CELLS", len(own.selection.live) ** 2)
    few = PairLayer(own.arms, own.texts, TEXTS, ("test",))
    assert (
        few.every
        == f"{len(own.every.live)} live features make too large a table of pairs ({len(few.selection.live)} would fit)"
    )
    with pytest.raises(CannotLoad, match="a control of stability"):
        q11_stability.lists_again(few, Stability())
    torch.testing.assert_close(few.selection.tables, own.selection.tables)
    monkeypatch.setattr(activity_module, "TABLE_CELLS", 16)
    with pytest.raises(CannotLoad, match=r"too large a table of pairs \(4 would fit\)"):
        PairLayer(own.arms, own.texts, TEXTS, ("test",))


def test_too_little_text_is_no_mistake_of_the_claims() -> None:
    texts = [SimpleNamespace(text="one two three", source="a")] * 3
    many = [SimpleNamespace(text="one two three", source="a")] * 50
    target: Any = SimpleNamespace(
        name="tiny", documents=lambda: texts, bos=0, encode=lambda text, limit=None: [1, 2, 3]
    )
    target.model = SimpleNamespace(cfg=SimpleNamespace(n_ctx=32))
    one: Any = SimpleNamespace(**(vars(target) | {"documents": lambda: many}))
    lacking: list[Callable[[], Any]] = [
        lambda: pair_texts(target, TEXTS),
        lambda: pair_texts(one, TEXTS),  # all of one source
        lambda: natural_module.natural_sources(target, 4),
        lambda: carried.document_sets(target),
        lambda: carried.texts([], 8),
        lambda: sets.documents(target, "repeated_natural", RepeatedSets()),
        lambda: repeated.token_pool(np.ones(8)),
        lambda: repeated.periods(3, 4, np.random.default_rng(0)),
        lambda: q22_swaps.frequent(carried.texts([("a", [0, 1, 2])], 8)),
    ]
    for ask in lacking:
        with pytest.raises(CannotLoad):  # fixtures.verdict makes CANNOT_RUN of it
            ask()
