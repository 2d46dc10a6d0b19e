"""Pairs of features on natural text: tables and lists against loops, planted heads against their claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats as sps

from fra.claim import Claim, Condition, Outcome, judge
from fra.core.coded import Arm, measure_arm
from fra.errors import CannotLoad
from fra.measures.pairs import activity as activity_module
from fra.measures.pairs import q09_q10_q11_evidence as evidence_for
from fra.measures.pairs import q09_q11_pairs
from fra.measures.pairs.activity import FLOOR, Activity, halves, mean_while_live, summed
from fra.measures.pairs.q09_q11_pairs import STRONGEST, LayerPairs, Natural
from fra.measures.pairs.q10_prediction import PAIRS, joint_terms, prediction_of, predictions
from fra.measures.scores import layer as carried
from fra.measures.scores import q22_swaps
from fra.stimuli import natural as natural_module
from fra.stimuli import repeated, sets
from fra.stimuli.designs import RepeatedSets
from fra.tests import circuit, models
from fra.tests.claims import claim
from fra.tests.models import tiny_sae
from fra.verdicts import jackknife
from fra.verdicts.decide import Sampled, corrected

N = 48


def some_text(n: int = N, length: int = 26) -> Natural:
    """Random tokens, two documents a source, of two lengths, padded."""
    lengths = tuple(length - 3 * (k % 3 == 0) for k in range(n))
    tokens = torch.stack([models.random_tokens(length, seed) for seed in range(n)])
    return Natural(tokens, lengths, tuple(f"source {k // 2}" for k in range(n)))


@cache
def activity(kind: str) -> tuple[Activity, Natural]:
    documents = some_text()
    sae = models.tiny_sae("blocks.1.hook_resid_pre", dtype="float64")
    arm = measure_arm(models.tiny(kind, torch.float64), sae, documents.tokens, 1, "blocks.1.hook_resid_pre")
    return Activity(arm, documents.lengths, documents.sources, halves(documents.sources, ("test",))), documents


def test_tables_are_sums_over_earlier_positions_of_real_tokens() -> None:
    own, documents = activity("gpt2")
    codes = (own.arm.codes.dense() / own.arm.frozen.sigma[..., None])[..., own.live]
    rng = np.random.default_rng(0)
    chosen = [*rng.integers(0, len(own.live), (12, 2)).tolist(), [3, 3]]
    by_source = own.by_source(torch.tensor([i * len(own.live) + j for i, j in chosen]))
    for k, (i, j) in enumerate(chosen):
        expected = np.zeros((3, 2))
        for d, length in enumerate(documents.lengths):
            seen = [float(codes[d, t, i] * codes[d, s, j]) for t in range(1, length) for s in range(1, t)]
            live = [value for value in seen if value]
            expected[:, 0 if own.first[d] else 1] += (sum(live), len(live), bool(live))
        found = [part[:, i, j].tolist() for part in (own.tables.products, own.tables.count, own.tables.documents)]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        first = np.array([own.first[own.source == k][0] for k in range(len(own.names))])
        np.testing.assert_allclose(by_source[:, first, k].sum(1), expected[:, 0], rtol=1e-9)
        np.testing.assert_allclose(by_source[:, ~first, k].sum(1), expected[:, 1], rtol=1e-9)


def test_halves_keep_sources_together() -> None:
    sources = [f"s{k % 7}" for k in range(30)]
    first = halves(sources, ("x",))
    assert len({s for s, one in zip(sources, first, strict=True) if one}) == 3
    assert not {s for s, one in zip(sources, first, strict=True) if one} & {
        s for s, one in zip(sources, first, strict=True) if not one
    }
    with pytest.raises(CannotLoad, match="one source"):
        halves(["a", "a"], ("x",))


def by_hand(own: Activity, head: int, without: str | None, floor: int) -> tuple[list[set[int]], float]:
    """The lists of both halves and the share of self channels, from dense codes, a source left out."""
    codes = (own.arm.codes.dense() / own.arm.frozen.sigma[..., None])[..., own.live].numpy()
    U, V = (part[own.live].numpy() for part in own.arm.couplings(head))
    G = np.abs(U @ V.T)
    sums = np.zeros((3, 2, *G.shape))
    for d, (length, source) in enumerate(zip(own.lengths, own.names[own.source], strict=True)):
        if source != without:
            dense = codes[d, 1:length]
            live = (dense != 0).astype(float)
            count = live.T @ (np.cumsum(live, 0) - live)
            sums[:, 0 if own.first[d] else 1] += (dense.T @ (np.cumsum(dense, 0) - dense), count, count > 0)
    lists = []
    for products, count, documents in sums.transpose(1, 0, 2, 3):
        value = np.where(documents >= floor, G * products / np.maximum(count, 1), -np.inf).ravel()
        lists.append({int(k) for k in np.argsort(-value)[:STRONGEST] if np.isfinite(value[k])})
    total = np.where(sums[2].sum(0) >= 2 * FLOOR, G * sums[0].sum(0), -np.inf).ravel()
    top = np.argsort(-total)[:STRONGEST]
    return lists, float(np.mean(top // len(G) == top % len(G)))


def test_lists_with_and_without_a_source_are_those_of_an_enumeration() -> None:
    own, documents = activity("gpt2")
    loose = Activity(own.arm, documents.lengths, documents.sources, own.first, floor=1)
    assert len(loose.live) > len(own.live), "no feature is rare here"
    (found,) = q09_q11_pairs.Lists(own, ("test",)).heads([2])
    (without,) = q09_q11_pairs.Lists(loose, ("test",), floor=1).stability([2])
    measured = q09_q11_pairs.measure_arm_pairs(own.arm, documents, ("test",)).pairs[2]
    assert isinstance(measured, q09_q11_pairs.HeadPairs)
    assert measured.stable_any is not None and measured.stable_any.estimate == without.estimate
    for at, jackknifed, floor in ((own, found.stable, FLOOR), (loose, without, 1)):
        lists, share = by_hand(at, 2, None, floor)
        assert jackknifed.estimate == pytest.approx(len(lists[0] & lists[1]) / len(lists[0] | lists[1]))
        for k in (0, 5, 11):
            lists, share = by_hand(at, 2, own.names[k], floor)
            assert jackknifed.left_out[k] == pytest.approx(len(lists[0] & lists[1]) / len(lists[0] | lists[1]))
            assert floor == 1 or found.self_share.left_out[k] == pytest.approx(share)
    assert found.self_share.estimate == pytest.approx(by_hand(own, 2, None, FLOOR)[1])


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "pythia"])
def test_the_correlation_is_that_of_a_softmax_without_the_channel(kind: str) -> None:
    own, documents = activity(kind)  # gemma2 caps its scores, rotates and has a window; pythia rotates
    head = 1
    (found,) = predictions(own, [head], ("test",))
    joint = joint_terms(own, ("test",))
    frozen, codes = own.arm.frozen, own.arm.codes.dense() / own.arm.frozen.sigma[..., None]
    U, V = own.arm.couplings(head)
    pos = codes.shape[1]
    scores = frozen.scores(head)
    G, ratio = [], []
    for i, j in joint.pairs[:25].tolist():
        looked = even = weighted = 0.0
        for d, length in enumerate(documents.lengths):
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
    assert len(joint.pairs) <= PAIRS
    kept = joint.pair < 25
    few = dataclasses.replace(
        joint,
        pairs=joint.pairs[:25],
        activity=joint.activity[:25],
        group=torch.unique(joint.group[kept], return_inverse=True)[1],
        **{name: getattr(joint, name)[kept] for name in ("pair", "source", "row_q", "row_k", "product")},
    )
    again = prediction_of(own, few, head, ("test",))
    assert again.correlation.estimate == pytest.approx(sps.spearmanr(G, ratio).statistic, abs=1e-6)
    low, high = np.quantile(ratio, [0.25, 0.75])
    assert again.spread.estimate == pytest.approx(high - low, rel=1e-5)
    assert abs(found.correlation.estimate) <= 1
    assert abs(np.mean(found.matched)) < 0.2


# A planted head on a one-hot dictionary: what it reads is written down.


def written(coupling: torch.Tensor, shuffle_second_half: bool = False) -> LayerPairs:
    """The circuit's head with `coupling` between tokens, on texts of twenty tokens."""
    rng = np.random.default_rng(0)
    texts = rng.integers(0, 20, (60, circuit.N_CTX))
    texts[:, 0] = circuit.BOS
    sources = tuple(f"s{k % 30}" for k in range(60))
    first = halves(sources, ("planted",))
    if shuffle_second_half:
        texts[~first, 1:] += 20
    model, sae = circuit.model(), circuit.dictionary()
    arm = measure_arm(model, sae, torch.from_numpy(texts), 1, circuit.HOOK)
    W_q, W_k = arm.frozen.W_q.clone(), arm.frozen.W_k.clone()
    W_q[1], W_k[1] = 0.0, 0.0
    W_q[1, : circuit.D_VOCAB] = coupling / arm.frozen.scale
    W_k[1, : circuit.D_VOCAB] = torch.eye(circuit.D_VOCAB)
    frozen = dataclasses.replace(arm.frozen, W_q=W_q, W_k=W_k)
    pattern = frozen.pattern.clone()
    pattern[:, 1] = frozen.scores(1).softmax(-1)
    arm = Arm(dataclasses.replace(frozen, pattern=pattern), arm.codes)
    return q09_q11_pairs.measure_arm_pairs(
        arm, Natural(torch.from_numpy(texts), (circuit.N_CTX,) * 60, sources), ("planted",)
    )


SELF, STABLE, PREDICT = (claim(name) for name in ("Q09", "Q11", "Q10"))


@cache
def planted(name: str) -> LayerPairs:
    tokens = circuit.D_VOCAB
    rng = torch.Generator().manual_seed(1)
    one = torch.eye(tokens)
    return {
        "self": lambda: written(3.0 * one),
        "next": lambda: written(3.0 * one.roll(1, 1)),
        "random": lambda: written(torch.randn(tokens, tokens, generator=rng)),
        "moved": lambda: written(torch.randn(tokens, tokens, generator=rng), shuffle_second_half=True),
    }[name]()


def verdict(statistic: Any, of: Claim, name: str) -> Outcome:
    return judge(of, statistic(of, {1: planted(name)})["L1H1"]).outcome


def test_self_channels_are_found_where_they_were_planted_and_nowhere_else() -> None:
    assert verdict(evidence_for.self_channels, SELF, "self") is Outcome.SUPPORTED
    assert verdict(evidence_for.self_channels, SELF, "next") is Outcome.REFUTED
    assert verdict(evidence_for.self_channels, SELF, "random") is Outcome.REFUTED


def test_lists_are_not_stable_where_the_text_changes_between_halves() -> None:
    stable, moved = (planted(name).pairs[1].stable.estimate for name in ("random", "moved"))  # type: ignore[union-attr]
    assert stable > 0.5
    assert moved < 0.1
    assert verdict(evidence_for.stability, STABLE, "moved") is Outcome.REFUTED


def stable_lists(any_: float, atoms: float) -> dict[str, Outcome]:
    """Condition by condition, what is said of a head with a Jaccard of 0.9 that hardly varies."""
    flat = lambda value: jackknife.jackknifed(value, [value] * 30, q09_q11_pairs.LEAST)  # noqa: E731
    lists: dict[str, Any] = {"stable": flat(0.9), "stable_any": flat(any_), "stable_atoms": flat(atoms)}
    lists["stable_shuffled"] = [0.1] * 40
    own = dataclasses.replace(planted("random").pairs[1], **lists)  # type: ignore[type-var, arg-type]
    layer = dataclasses.replace(planted("random"), pairs=[own], n_heads=1)
    evidence = evidence_for.stability(STABLE, {1: layer})["L1H0"]
    (given,) = evidence.candidates.values()
    assert judge(STABLE, evidence).outcome is not Outcome.INCONCLUSIVE
    word = {(True, False): Outcome.SUPPORTED, (False, True): Outcome.REFUTED, (False, False): Outcome.INCONCLUSIVE}
    return {c.name: word[c.holds(0.05), c.fails(0.05)] for c in given}


def test_a_tie_with_a_control_of_stability_passes_or_fails() -> None:
    """As stable without the minimum: the minimum does nothing. As stable with random atoms: features do nothing."""
    tie = stable_lists(0.9, 0.3)
    assert tie["over no minimum"] is Outcome.SUPPORTED and tie["over random atoms"] is Outcome.SUPPORTED
    assert stable_lists(0.2, 0.9)["over random atoms"] is Outcome.REFUTED
    assert stable_lists(1.0, 0.3)["over no minimum"] is Outcome.REFUTED  # the minimum makes lists differ


def test_where_a_head_looks_has_an_interval_and_a_spread_near_its_bar_refutes_nothing() -> None:
    own, _ = activity("gpt2")
    (found,) = predictions(own, [1], ("test",))
    assert len(found.spread.left_out) == len(own.names) and found.spread.se > 0
    assert len(found.matched) == 999
    # without a source: as if its documents had not been read
    joint = joint_terms(own, ("test",))
    kept = joint.source != 3
    fields = {name: getattr(joint, name)[kept] for name in ("pair", "source", "row_q", "row_k", "product")}
    group = torch.unique(joint.group[kept], return_inverse=True)[1]
    without = prediction_of(own, dataclasses.replace(joint, group=group, **fields), 1, ("test",))
    assert found.spread.left_out[3] == pytest.approx(without.spread.estimate)
    assert found.correlation.left_out[3] == pytest.approx(without.correlation.estimate)
    about = jackknife.jackknifed(0.09, 0.09 + 0.05 * np.random.default_rng(0).standard_normal(30))
    near = [dataclasses.replace(found, spread=about)]
    layer = dataclasses.replace(planted("random"), predictions=near, n_heads=1)
    (given,) = evidence_for.prediction(PREDICT, {1: layer})["L1H0"].candidates.values()
    spread = next(c for c in given if c.name == "spread of the log ratio")
    assert spread.low < 0.09 < 0.1 < spread.high and not spread.fails(0.05) and not spread.holds(0.05)


def test_a_channel_does_not_vouch_for_itself() -> None:
    """One-hot features: without a channel nothing of its coupling is left, and weights foretell nothing."""
    own = planted("random").predictions[1]
    assert abs(own.correlation.estimate) < 0.3
    assert verdict(evidence_for.prediction, PREDICT, "random") is not Outcome.SUPPORTED


def only_condition(own: jackknife.Jackknifed, bar: float) -> Condition:
    """The only condition of the only head."""
    (((condition,),),) = corrected(SELF, [Sampled(name="", samples={"L0H0": own}, bar=bar)]).conditions.values()
    return condition


def test_jackknife_is_the_textbook_one_for_a_mean() -> None:
    values = np.random.default_rng(0).normal(0.3, 1.0, 20)
    own = jackknife.jackknifed(values.mean(), [np.delete(values, k).mean() for k in range(20)])
    assert own.se == pytest.approx(values.std(ddof=1) / 20**0.5)
    for bar in (-0.5, 0.0, 2.0):
        condition = only_condition(own, bar)
        assert condition.p == pytest.approx(sps.ttest_1samp(values, bar, alternative="greater").pvalue)
        assert condition.p_refute == pytest.approx(sps.ttest_1samp(values, bar, alternative="less").pvalue)
        assert condition.holds(0.05) == (condition.low > bar)
        assert condition.fails(0.05) == (condition.high < bar)


def test_what_does_not_vary_is_not_certain() -> None:
    flat = jackknife.jackknifed(0.2, [0.2] * 10)
    condition = only_condition(flat, 0.1)
    assert not condition.holds(0.05)
    assert not condition.fails(0.05)
    assert jackknife.jackknifed(0.2, [0.2] * 10, least=0.01).se == 0.01


def test_rotary_heads_are_left_out_of_the_lists_and_not_of_the_correlation() -> None:
    own, documents = activity("pythia")
    found = q09_q11_pairs.measure_arm_pairs(own.arm, documents, ("test",))
    assert isinstance(found.pairs, str)
    assert len(found.predictions) == own.arm.frozen.n_heads
    evidence = evidence_for.self_channels(SELF, {1: found})
    assert all(judge(SELF, one).outcome is Outcome.CANNOT_RUN for one in evidence.values())


def outcomes(layers: dict[int, LayerPairs]) -> dict[str, dict[str, Any]]:
    """By claim, the verdict at every head."""
    return {
        name: {h: judge(of, e) for h, e in statistic(of, layers).items()}
        for name, statistic, of in (
            ("Q09", evidence_for.self_channels, SELF),
            ("Q10", evidence_for.prediction, PREDICT),
            ("Q11", evidence_for.stability, STABLE),
        )
    }


def test_a_layer_with_too_few_live_pairs_cannot_run_and_says_so_while_others_are_judged() -> None:
    documents = some_text(16)  # no pair is live in twenty of sixteen documents
    sae = tiny_sae("blocks.1.hook_resid_pre", dtype="float64")
    arm = measure_arm(models.tiny("gpt2", torch.float64), sae, documents.tokens, 1, "blocks.1.hook_resid_pre")
    few = q09_q11_pairs.measure_arm_pairs(arm, documents, ("test",))
    found = outcomes({0: few, 1: planted("self")})
    for verdicts in found.values():
        assert {v.outcome for h, v in verdicts.items() if h[:2] == "L0"} == {Outcome.CANNOT_RUN}
        assert "only 0 pairs of features of layer 1 are jointly live in 20 documents" in verdicts["L0H0"].reason
        assert all(v.outcome is not Outcome.CANNOT_RUN for h, v in verdicts.items() if h[:2] == "L1")
    assert {v.outcome for v in outcomes({0: few})["Q10"].values()} == {Outcome.CANNOT_RUN}


def test_a_layer_with_too_many_live_features_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    own, documents = activity("gpt2")
    monkeypatch.setattr(activity_module, "TABLE_CELLS", 16)
    found = outcomes({0: q09_q11_pairs.measure_arm_pairs(own.arm, documents, ("test",))})
    reasons = {v.reason for verdicts in found.values() for v in verdicts.values()}
    assert reasons == {f"{len(own.live)} live features make too large a table of pairs (4 would fit)"}


def test_only_halves_need_pairs_in_either_half() -> None:
    documents = some_text()
    sources = tuple("a" if k < 44 else "b" for k in range(N))  # one half has four documents
    own = dataclasses.replace(documents, sources=sources)
    found = outcomes({0: q09_q11_pairs.measure_arm_pairs(activity("gpt2")[0].arm, own, ("test",))})
    assert {v.outcome for v in found["Q11"].values()} == {Outcome.CANNOT_RUN}
    assert found["Q11"]["L0H0"].reason.startswith("only ")
    assert "in 10 documents of either half" in found["Q11"]["L0H0"].reason
    assert Outcome.CANNOT_RUN not in {v.outcome for name in ("Q09", "Q10") for v in found[name].values()}


def test_too_little_text_is_no_mistake_of_the_claims() -> None:
    texts = [SimpleNamespace(text="one two three", source="a")] * 3
    target: Any = SimpleNamespace(name="tiny", documents=lambda: texts, bos=0, encode=lambda text: [1, 2, 3])
    target.model = SimpleNamespace(cfg=SimpleNamespace(n_ctx=32))
    lacking: list[Callable[[], Any]] = [
        lambda: q09_q11_pairs.natural(target, 60),
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


def test_values_leave_out_pairs_below_the_floor() -> None:
    sums = np.array([[6.0, 6.0]]), np.array([[3.0, 2.0]]), np.array([[2.0, 1.0]])
    assert mean_while_live(2)(*sums).tolist() == [[2.0, -np.inf]]
    assert summed(1)(*sums).tolist() == [[6.0, 6.0]]
