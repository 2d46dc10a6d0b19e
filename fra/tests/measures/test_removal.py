"""Removal of channels inside a forward pass (Q07, Q17): the fast route against the hooks, the controls against what
they must be, and both claims on the hand-built circuit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import fra
from fra.claim import Outcome, judge
from fra.core.coded import measure_arm
from fra.errors import FraError
from fra.induction.cih import Screen
from fra.induction.status import head_status
from fra.interventions import attach, scores
from fra.interventions import heads as whole_heads
from fra.interventions.downstream import Downstream, Scene
from fra.measures.channels import q07_q17_removal as removal
from fra.measures.channels.q07_q17_evidence import plan_of, removal_evidence, selectivity_evidence
from fra.measures.channels.q07_q17_matched import Pool, RandomSets, displaced
from fra.measures.channels.q07_q17_reading import MEASURES, BatchPart
from fra.measures.channels.q07_q17_removal import HeadRemoval, OnRanked, Plan
from fra.measures.channels.transfer_designs import ChannelSet, MatchedSets, Removal
from fra.search.screen import HeadScreen
from fra.search.search import Search
from fra.statistics.unseen import sources_for
from fra.stimuli import repeated
from fra.stimuli.designs import RepeatedSets
from fra.tests import circuit
from fra.tests.claims import claim
from fra.tests.intervening import HEAD, LAYER, hook_of, strong
from fra.tests.models import random_tokens, tiny, tiny_sae

TOKENS = torch.stack([random_tokens(16, seed) for seed in (0, 1)])
DOC, POS = (axis.flatten() for axis in torch.meshgrid(torch.arange(2), torch.arange(16), indexing="ij"))


# ---- the rest of the model, run again


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "pythia"])
def test_the_rest_of_the_model_does_what_the_whole_does(kind: str) -> None:
    model, sae = tiny(kind), tiny_sae(hook_of(kind))
    scene = Scene(model, sae, TOKENS, LAYER)
    assert scene.down.whole == (kind == "gemma2")  # the cap of its logits stands behind the unembedding
    heads = [fra.resolve(model, sae, document, LAYER, HEAD) for document in TOKENS]
    channels = strong(heads, 30)
    own = scene.head(HEAD)
    taken = scores.channel_share(channels)(scene.arm, HEAD)
    changes: dict[str, tuple[attach.Intervention, attach.Intervention]] = {
        "removed": (
            fra.remove(model, channels, layer=LAYER, head=HEAD, dictionary=sae),
            own.without(taken),
        ),
        "twice": (
            scores.scale(model, channels, -1.0, layer=LAYER, head=HEAD, dictionary=sae),
            own.without(2 * taken),
        ),
        "zero": (whole_heads.zero_ablate(model, layer=LAYER, head=HEAD), own.by(-own.z)),
    }
    with torch.no_grad():
        plain = model(TOKENS)
        assert float((scene.down.logits(DOC, POS) - plain[DOC, POS]).abs().max()) < 1e-6
        for hooks, fast in changes.values():
            with hooks:
                truth = model(TOKENS)
            with fast:
                found = scene.down.logits(DOC, POS)
            assert float((truth - plain).abs().max()) > 0.05
            assert float((found - truth[DOC, POS]).abs().max()) < 1e-4 * float(truth.abs().max())
        assert torch.equal(scene.down.logits(DOC, POS), scene.down.logits(DOC, POS))
        assert torch.equal(model(TOKENS), plain)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_copies_of_one_document_run_side_by_side(kind: str) -> None:
    model = tiny(kind)
    down = Downstream(model, TOKENS[:1], 0)  # a layer below the last: later rows feel it through attention
    delta = torch.zeros(3, 16, 4, 8)
    delta[1, 9, HEAD] = 1.0
    delta[2, 9, 0] = -1.0
    rows = torch.arange(3), torch.full((3,), 11)
    with torch.no_grad():
        with down.shifted(None, delta):
            found = down.logits(*rows, copies=3)
        plain = model(TOKENS[:1])[0, 11]
        with down.shifted(HEAD, delta[1:2, :, HEAD]):
            alone = model(TOKENS[:1])[0, 11]
    assert float((found[0] - plain).abs().max()) < 1e-5
    assert float((found[1] - alone).abs().max()) < 1e-5
    assert float((found[1] - plain).abs().max()) > 1e-3 < float((found[2] - found[1]).abs().max())


# ---- random live sets


def test_random_sets_are_live_near_in_mass_and_move_as_much() -> None:
    model, sae = tiny("gpt2"), tiny_sae(hook_of("gpt2"))
    scene = Scene(model, sae, TOKENS, LAYER)
    own = scene.head(HEAD)
    table = fra.census(model, sae, list(TOKENS), LAYER, [HEAD], "mass").channels()
    members = table[["q_feature", "k_feature"]].to_numpy()[5:50:5]
    pool = Pool(table, members)
    taken = scores.channel_share(torch.tensor(members))(scene.arm, HEAD)
    rows = torch.ones(2, 16, dtype=torch.bool)
    rows[:, 0] = False
    target = float(displaced(own, taken, rows).sum())
    share = lambda some: scores.channel_share(some)(scene.arm, HEAD)  # noqa: E731
    sets = RandomSets(own, share, pool, target, rows, MatchedSets(), ("test",))
    assert sets.matchable()
    found = [one for number in range(20) if (one := sets.draw(number)) is not None]
    assert len(found) == 20
    again = sets.draw(7)  # each from a seed of its own, whatever was drawn before
    assert again is not None and np.array_equal(again.pairs, found[7].pairs) and again.scale == found[7].scale
    assert len({one.pairs.tobytes() for one in found}) == 20
    mass = {(int(q), int(k)): float(v) for q, k, v in table[["q_feature", "k_feature", "value"]].to_numpy()}
    own_pairs = {tuple(map(int, pair)) for pair in members}
    for one in found:
        pairs = [tuple(map(int, pair)) for pair in one.pairs]
        assert len(set(pairs)) == len(members) and not own_pairs & set(pairs)
        assert abs(float(displaced(own, one.scale * share(torch.tensor(one.pairs)), rows).sum()) / target - 1) < 0.02
        for pair, member in zip(pairs, members.tolist(), strict=True):  # among the forty nearest: not far in rank
            low, high = sorted((mass[pair], mass[tuple(member)]))
            assert sum(low < m < high for other, m in mass.items() if other not in own_pairs) <= 40
    # half of all that moves, by hand
    with fra.remove(model, members, layer=LAYER, head=HEAD, dictionary=sae), torch.no_grad():
        _, after = model.run_with_cache(TOKENS, names_filter=[f"blocks.{LAYER}.attn.hook_pattern"])
    _, before = model.run_with_cache(TOKENS, names_filter=[f"blocks.{LAYER}.attn.hook_pattern"])
    name = f"blocks.{LAYER}.attn.hook_pattern"
    moved = (after[name] - before[name])[:, HEAD].abs().sum(-1)[:, 1:].sum() / 2
    assert target == pytest.approx(float(moved), rel=1e-3)


def test_what_no_live_set_can_move_is_not_matched() -> None:
    model, sae = tiny("gpt2"), tiny_sae(hook_of("gpt2"))
    scene = Scene(model, sae, TOKENS, LAYER)
    table = fra.census(model, sae, list(TOKENS), LAYER, [HEAD], "mass").channels()
    weak = table.iloc[-40:]
    pool = Pool(pd.concat([table.iloc[:3], weak]), table[["q_feature", "k_feature"]].to_numpy()[:3])
    rows = torch.ones(2, 16, dtype=torch.bool)
    share = lambda some: scores.channel_share(some)(scene.arm, HEAD)  # noqa: E731
    sets = RandomSets(scene.head(HEAD), share, pool, 20.0, rows, MatchedSets(), ("test",))
    assert sets.draw(0) is None and not sets.matchable()
    few = Pool(table.iloc[:5], table[["q_feature", "k_feature"]].to_numpy()[:3])
    assert not RandomSets(scene.head(HEAD), share, few, 0.1, rows, MatchedSets(), ("test",)).matchable()


def test_a_set_that_cannot_be_matched_is_drawn_again() -> None:
    """A pool in which one channel in eight can move what is asked: among twenty tries there is nearly always one."""
    model, sae = tiny("gpt2"), tiny_sae(hook_of("gpt2"))
    scene = Scene(model, sae, TOKENS, LAYER)
    own, rows = scene.head(HEAD), torch.ones(2, 16, dtype=torch.bool)
    share = lambda some: scores.channel_share(some)(scene.arm, HEAD)  # noqa: E731
    table = fra.census(model, sae, list(TOKENS), LAYER, [HEAD], "mass").channels()
    pool = Pool(pd.concat([table.iloc[:5], table.iloc[-35:]]), table[["q_feature", "k_feature"]].to_numpy()[:1])
    strong = {tuple(pair) for pair in table[["q_feature", "k_feature"]].to_numpy()[1:5].tolist()}
    weakest = min(float(displaced(own, 16 * share(torch.tensor([pair])), rows).sum()) for pair in strong)
    sets = RandomSets(own, share, pool, 0.9 * weakest, rows, MatchedSets(tries=100), ("test",))
    drawn = [sets.draw(number) for number in range(6)]
    assert all(one is not None and tuple(one.pairs[0].tolist()) in strong for one in drawn)
    assert not sets.matchable()  # of those that are drawn first, too few can
    hasty = RandomSets(own, share, pool, 0.9 * weakest, rows, MatchedSets(tries=1), ("test",))
    assert None in [hasty.draw(number) for number in range(6)]


# ---- both claims on a circuit whose only channels were written down


Q07, Q17 = claim("Q07"), claim("Q17")
N = sources_for(Q07.level, 4)
"""Documents that can tell four heads' status at once, and refute Q07 by any of its four samples."""
SIZES = {"status": N, "discovery": 90, "confirmation": 12, "sets": N}
PLAN = Plan(removal=Removal(measured=N, summed=24))


def circuit_with_constants() -> Any:
    """The circuit with large scores that are constant along every row: they win by plain sum, and softmax ignores
    them.
    """
    model = circuit.model()
    place = circuit.D_VOCAB + torch.arange(circuit.N_CTX)
    second: Any = model.blocks[1].attn
    with torch.no_grad():
        second.W_Q[0, place, circuit.BOS] = 5 * circuit.D_VOCAB**0.5
        second.W_K[0, :, circuit.BOS] = 0.0  # nothing was preceded by it twice
        second.W_K[0, place, circuit.BOS] = 1.0
    return model


def document_sets() -> dict[str, repeated.Batch]:
    made = repeated.repeated_random(sum(SIZES.values()), np.arange(48), circuit.N_CTX, circuit.BOS, ("circuit",))
    sets, start = {}, 0
    for name, n in SIZES.items():
        sets[name] = repeated.collate(made[start : start + n])
        start += n
    return sets


def screen_of(pairs: np.ndarray) -> HeadScreen:
    """Of a screen, nothing but its channels and an example is asked for."""
    screen: Any = object.__new__(HeadScreen)
    object.__setattr__(screen, "example", None)
    object.__setattr__(screen, "pairs", pairs)
    return screen


@pytest.fixture(scope="module")
def found() -> tuple[Screen, Mapping[str, HeadRemoval]]:
    model, sae = circuit_with_constants(), circuit.dictionary()
    sets = document_sets()
    status = head_status(model, sets["status"], target="circuit", stimulus="repeated_random")
    arm = measure_arm(model, sae, sets["discovery"].tokens, 1, circuit.HOOK)
    pairs, _ = Search(sets["discovery"], arm).stripes((0,), 20)[0].strongest(arm, 0, 50)
    screened = Screen("circuit", "repeated_random", status, {"L1H0": screen_of(pairs.numpy())}, SIZES, str)
    target: Any = SimpleNamespace(model=model, name="circuit", dictionary_for=lambda layer: (circuit.HOOK, sae))
    chosen = removal.choose(target, screened, sets["discovery"], 1, [0], PLAN)
    tuned = removal.tune(target, sets["confirmation"], 1, chosen, PLAN, ("circuit",))
    measured = removal.measure(target, sets["sets"], 1, chosen, tuned, PLAN)
    strange = dataclasses.replace(screened, heads={"L1H0": screen_of(pairs.numpy() + 60)})
    with pytest.raises(FraError, match="the screen of L1H0"):
        removal.choose(target, strange, sets["discovery"], 1, [0], PLAN)
    return screened, measured


def nothing(_: int) -> OnRanked:
    """A random set that does nothing."""
    return OnRanked(np.zeros((1, 2), dtype=int), np.zeros(3), np.ones(2))


def beaten(one: HeadRemoval) -> HeadRemoval:
    """As if random sets had been found, and had done nothing: in the circuit no other live set moves any attention."""
    return dataclasses.replace(one, random=nothing)


def test_the_circuits_channels_do_what_they_were_built_for(found: Any) -> None:
    screened, measured = found
    one = measured["L1H0"]
    per_row = {name: one.per_row(name) for name in one.outcomes}
    # the head writes 5 x its attention to the copied token on that token's logit, and nothing else does
    assert 4 < per_row[removal.ZERO][0, 0] < 5
    assert per_row[removal.CIH][0, 0] > 0.8 * per_row[removal.ZERO][0, 0]
    assert abs(per_row["1 channels"][0, 0] - per_row[removal.CIH][0, 0] / 48) < 0.05
    assert per_row["500 channels"] == pytest.approx(per_row[removal.CIH], abs=0.1)
    assert per_row[removal.ON_STRIPE][0] == pytest.approx(per_row[removal.CIH][0], abs=0.1)
    assert np.abs(per_row[removal.OFF_STRIPE][0]).max() < 0.1
    assert np.abs(per_row[removal.SUM][0]).max() < 0.2  # nearly all of them constant along rows
    assert per_row[removal.FROZEN] == pytest.approx(per_row[removal.CIH])  # it has no norm
    assert one.ranked.displaced[0] > 0.7 and one.ranked.displaced[1] < 0.01
    assert one.random is None
    given = judge(Q07, removal_evidence(Q07, screened, measured)["L1H0"])
    assert given.outcome is Outcome.INCONCLUSIVE and "was not measured" in given.reason
    evidence = removal_evidence(Q07, screened, {"L1H0": beaten(one)})
    given = judge(Q07, evidence["L1H0"])
    assert given.outcome is Outcome.SUPPORTED, given.reason
    assert evidence["L1H0"].n == N
    assert evidence["L1H0"].detail["random live sets"]["number"] == evidence["L1H0"].detail["draws of the nulls"]
    assert evidence["L1H1"].outside is not None


def by_hand(model: Any, sae: Any, tokens: torch.Tensor, period: int, change: Any) -> np.ndarray:
    """[copies, measures] sums over the rows of one document, read off the model's own logits row by row."""
    with torch.no_grad():
        before = model(tokens[None])[0].double()
        with change:
            after = model(tokens[None])[0].double()
    passage = tokens[1 : period + 1].tolist()
    sums = np.zeros((2, 3))
    for copy, start in enumerate((period + 1, 1)):
        for r in range(period - 1):  # the last token of a copy has no next one in it
            t, following = start + r, passage[r + 1]
            assert tokens[t] == passage[r] and tokens[t + 1] == following
            p, q = before[t].softmax(-1), after[t].softmax(-1)
            own = [float(logits[t, following] - logits[t].mean()) for logits in (before, after)]
            sums[copy] += (
                own[0] - own[1],
                float(p[following].log() - q[following].log()),
                float((p * (p / q).log()).sum()),
            )
    return sums


def test_what_is_measured_is_what_the_models_own_logits_say(found: Any) -> None:
    """Every document, both copies, row by row: set, plain sum, mean ablation, and how far it goes."""
    screened, measured = found
    model, sae, sets = circuit_with_constants(), circuit.dictionary(), document_sets()
    one, batch = measured["L1H0"], sets["sets"]
    z = "blocks.1.attn.hook_z"
    shortest = sorted(range(12), key=lambda d: int(sets["confirmation"].periods[d]))[:10]
    outputs = []
    for d in shortest:
        tokens = sets["confirmation"].documents()[d]
        outputs.append(model.run_with_cache(tokens[None], names_filter=[z])[1][z][0, 1:, 0])
    mean = torch.cat(outputs).mean(0)

    def to_mean(share: float) -> Any:
        def edit(value: torch.Tensor, hook: Any) -> torch.Tensor:
            value = value.clone()
            value[:, :, 0] += share * (mean - value[:, :, 0])
            return value

        return model.hooks(fwd_hooks=[(z, edit)])

    assert sorted(one.sources) == sorted(batch.sources)
    assert [float(batch.periods[batch.sources.index(s)] - 1) for s in one.sources] == one.rows.tolist()
    pairs = torch.from_numpy(screened.heads["L1H0"].pairs)
    for k in (0, 5, 17, 31):
        d = batch.sources.index(one.sources[k])
        tokens, period = batch.documents()[d], int(batch.periods[d])
        for name, change in (
            (removal.CIH, fra.remove(model, pairs, layer=1, head=0, dictionary=sae)),
            ("1 channels", fra.remove(model, pairs[:1], layer=1, head=0, dictionary=sae)),
            (removal.MEAN, to_mean(1.0)),
            (removal.EQUAL, to_mean(one.suppression)),
        ):
            expected = by_hand(model, sae, tokens, period, change)
            assert one.outcomes[name][k] == pytest.approx(expected, abs=2e-3), name


def test_effects_are_ratios_of_means_over_rows(found: Any) -> None:
    """A few long documents with much to say among short ones with little."""
    screened, measured = found
    rng = np.random.default_rng(1)
    rows = np.where(np.arange(N) % 4 == 0, 60.0, 10.0)
    size = np.where(rows > 30, 2.0, 0.4)
    outcomes = {
        name: rows[:, None, None] * size[:, None, None] ** power * rng.uniform(0.5, 1.5, (N, 2, 3))
        for name, power in {removal.CIH: 1, removal.MEAN: 2, removal.SUM: 0, removal.EQUAL: 3}.items()
    }
    one = dataclasses.replace(beaten(measured["L1H0"]), outcomes=outcomes, rows=rows)
    conditions = {}
    for c, evidence in ((Q07, removal_evidence), (Q17, selectivity_evidence)):
        conditions |= {
            x.name: x.effect for x in next(iter(evidence(c, screened, {"L1H0": one})["L1H0"].candidates.values()))
        }

    def total(name: str, copy: int, measure: int) -> float:
        return sum(float(outcomes[name][d, copy, measure]) for d in range(N))

    n = float(rows.sum())
    fall = total(removal.CIH, 0, 0)
    assert conditions["copied-token logit"] == pytest.approx(fall / n)
    assert conditions["loss"] == pytest.approx(total(removal.CIH, 0, 1) / n)
    assert conditions["share of the head's"] == pytest.approx(fall / total(removal.MEAN, 0, 0))
    assert conditions["over the top set by plain sum"] == pytest.approx((fall - total(removal.SUM, 0, 0)) / n)
    off = total(removal.CIH, 1, 2)
    assert conditions["off the stripe, against on it"] == pytest.approx(off / total(removal.CIH, 0, 2))
    against = conditions["off the stripe, against ablation at equal suppression"]
    assert against == pytest.approx(off / total(removal.EQUAL, 1, 2))


def test_random_sets_that_do_as_much_for_what_they_move_leave_it_open(found: Any) -> None:
    """They do a hair less, and move less on the second copy: the rank of the logit alone would have let it pass."""
    screened, measured = found
    one = measured["L1H0"]
    near = OnRanked(one.ranked.pairs, one.ranked.effects * 0.999, one.ranked.displaced * 0.99)
    evidence = removal_evidence(Q07, screened, {"L1H0": dataclasses.replace(one, random=lambda _: near)})["L1H0"]
    (conditions,) = evidence.candidates.values()
    held = {c.name: c.holds(0.05) for c in conditions}
    assert held.pop("over random live sets: logit per attention moved") is False
    assert judge(Q07, evidence).outcome is Outcome.INCONCLUSIVE
    # a set that does more than all of them in every respect but one
    for m, name in enumerate(MEASURES):
        better = np.where(np.arange(3) == m, 1.001, 0.5) * one.ranked.effects
        only = OnRanked(one.ranked.pairs, better, one.ranked.displaced * 4)
        evidence = removal_evidence(Q07, screened, {"L1H0": dataclasses.replace(one, random=lambda _, o=only: o)})[
            "L1H0"
        ]
        (conditions,) = evidence.candidates.values()
        assert {c.name: c.p for c in conditions}[f"over random live sets: {name}"] > 0.05
        assert judge(Q07, evidence).outcome is Outcome.INCONCLUSIVE


def test_draws_without_a_set_count_against(found: Any) -> None:
    screened, measured = found
    asked: list[int] = []

    def none(number: int) -> None:
        asked.append(number)

    evidence = removal_evidence(Q07, screened, {"L1H0": dataclasses.replace(measured["L1H0"], random=none)})["L1H0"]
    assert judge(Q07, evidence).outcome is Outcome.INCONCLUSIVE
    assert asked == list(range(len(asked))) and 1 <= len(asked) < 20  # and are not made for ever

    def every_third(number: int) -> OnRanked | None:
        return None if number % 3 == 0 else nothing(number)

    evidence = removal_evidence(Q07, screened, {"L1H0": dataclasses.replace(measured["L1H0"], random=every_third)})
    assert judge(Q07, evidence["L1H0"]).outcome is Outcome.INCONCLUSIVE


def test_selectivity_is_judged_against_the_crude_way(found: Any) -> None:
    screened, measured = found
    one = measured["L1H0"]
    given = judge(Q17, selectivity_evidence(Q17, screened, measured)["L1H0"])
    fall = {name: one.outcomes[name].sum(0)[0, 0] for name in (removal.EQUAL, removal.CIH)}
    assert fall[removal.EQUAL] == pytest.approx(fall[removal.CIH], rel=0.15)
    assert given.headline is not None and given.headline.effect < 0.01
    assert given.outcome is Outcome.SUPPORTED, given.reason
    # a set that does as much where nothing is to be copied is not selective
    rng = np.random.default_rng(0)
    same = {
        name: np.stack([sums[:, 0], sums[:, 0] * rng.uniform(0.5, 1.3, (len(sums), 1))], 1)
        for name, sums in one.outcomes.items()
    }
    blunt = {"L1H0": dataclasses.replace(one, outcomes=same)}
    assert judge(Q17, selectivity_evidence(Q17, screened, blunt)["L1H0"]).outcome is Outcome.REFUTED


def test_channels_that_do_nothing_are_refuted(found: Any) -> None:
    screened, measured = found
    one = beaten(measured["L1H0"])
    rng = np.random.default_rng(0)
    still = {name: 0.01 * rng.normal(size=sums.shape) for name, sums in one.outcomes.items()}
    idle = dataclasses.replace(one, outcomes=still)
    given = judge(Q07, removal_evidence(Q07, screened, {"L1H0": idle})["L1H0"])
    assert given.outcome is Outcome.REFUTED, given.reason
    assert "draws of the nulls" not in given.evidence.detail  # none is made where none can matter
    gated = judge(Q17, selectivity_evidence(Q17, screened, {"L1H0": idle})["L1H0"])
    assert gated.outcome is Outcome.INCONCLUSIVE and "selective about" in gated.reason


# ---- selection never sees what is measured


def short_documents(name: str, n: int, pool: np.ndarray) -> repeated.Batch:
    """Repeats of 8 to 14 tokens, which the tiny model's context holds."""
    rng = np.random.default_rng(len(name) + 100 * n + int(pool[0]))
    periods = rng.integers(8, 15, n).tolist()
    made = [repeated.repeat(rng.choice(pool, p, replace=False), 0, rng, f"{name}-{k}") for k, p in enumerate(periods)]
    return repeated.collate(made)


def test_what_is_selected_is_the_same_whatever_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels, plain-sum sets, means, suppression, random sets and their scales: bit for bit, through the door."""
    model, sae = tiny("gpt2"), tiny_sae(hook_of("gpt2"))
    target: Any = SimpleNamespace(model=model, name="tiny", dictionary_for=lambda layer: (hook_of("gpt2"), sae))
    plan = Plan(ChannelSet(6, 2), Removal(4, 2, 3, 5, (1, 20), 4), MatchedSets(probe=4))
    pool = np.arange(1, 200)
    chosen_on = {"discovery": short_documents("discovery", 12, pool), "confirmation": short_documents("c", 6, pool)}
    arm = measure_arm(model, sae, chosen_on["discovery"].tokens, LAYER, hook_of("gpt2"))
    pairs = Search(chosen_on["discovery"], arm).stripes((0,), 2)[0].strongest(arm, HEAD, 6)[0].numpy()
    screened = Screen("tiny", "repeated_random", {}, {f"L{LAYER}H{HEAD}": screen_of(pairs)}, {}, str)
    seen: list[Any] = []
    measure = removal.measure

    def kept(*given: Any) -> Any:
        seen.append(given[3:5])
        return measure(*given)

    monkeypatch.setattr(removal, "measure", kept)
    results = []
    for measured in (short_documents("sets", 6, pool), short_documents("others", 7, pool[::-1])):
        monkeypatch.setattr(removal.document_sets, "documents", lambda *_, m=measured: {**chosen_on, "sets": m})
        results.append(
            removal.removals(target, screened, [f"L{LAYER}H{HEAD}"], plan, RepeatedSets())[f"L{LAYER}H{HEAD}"]
        )
    (one, other), ((chosen, tuned), (chosen_too, tuned_too)) = results, seen
    assert one.sources != other.sources
    assert not np.array_equal(one.outcomes[removal.CIH], other.outcomes[removal.CIH])
    assert torch.equal(chosen[HEAD].ranked, chosen_too[HEAD].ranked)
    assert torch.equal(chosen[HEAD].by_sum, chosen_too[HEAD].by_sum)
    assert torch.equal(tuned[HEAD].mean, tuned_too[HEAD].mean)
    assert one.suppression == other.suppression and np.array_equal(one.ranked.pairs, other.ranked.pairs)
    assert one.random is not None and other.random is not None
    for number in range(4):
        here, there = one.random(number), other.random(number)
        assert here is not None and there is not None
        assert np.array_equal(here.pairs, there.pairs) and here.scale == there.scale
        assert not np.array_equal(here.effects, there.effects)
    # and they are those of the confirmation documents: a set moves as much there as the CIH set does
    c = chosen_on["confirmation"]
    part = BatchPart(target, c, sorted(range(6), key=lambda d: int(c.periods[d]))[:3], LAYER)
    moved = partial(displaced, part.scene.head(HEAD), rows=part.copies.any(0))
    random = one.random(0)
    assert random is not None
    sums = [
        float(moved(s * part.share(HEAD, torch.tensor(p))).sum())
        for s, p in ((1.0, pairs), (random.scale, random.pairs))
    ]
    assert sums[1] == pytest.approx(sums[0], rel=0.011)


def test_the_plan_is_what_the_claims_register() -> None:
    """A design that changes is a claim that changes, and reaches the measurement."""
    for c in (Q07, Q17):
        other = dataclasses.replace(c, design=(ChannelSet(7), Removal(measured=9), MatchedSets(window=3)))
        assert plan_of(other) == Plan(ChannelSet(7), Removal(measured=9), MatchedSets(window=3))
        assert other.digest != c.digest and c.n == plan_of(c).removal.measured
