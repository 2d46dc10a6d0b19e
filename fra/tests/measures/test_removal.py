"""Removal of channels inside a forward pass (Q07, Q17): the fast route against the hooks, the controls against what
they must be, and both claims on the hand-built circuit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
from fra.induction.screen import HeadScreen
from fra.induction.search import Search
from fra.induction.status import head_status
from fra.interventions import attach, scores
from fra.interventions import heads as whole_heads
from fra.interventions.downstream import Downstream, Scene
from fra.measures.channels import q07_q17_removal
from fra.measures.channels.q07_q17_evidence import removal_evidence, selectivity_evidence
from fra.measures.channels.q07_q17_matched import Pool, displaced, matched_sets
from fra.stimuli import repeated
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
    rng = np.random.default_rng(0)
    found = matched_sets(own, lambda some: scores.channel_share(some)(scene.arm, HEAD), pool, target, rows, 20, rng)
    assert len(found) == 20
    mass = {(int(q), int(k)): float(v) for q, k, v in table[["q_feature", "k_feature", "value"]].to_numpy()}
    own_pairs = {tuple(map(int, pair)) for pair in members}
    for one in found:
        pairs = [tuple(map(int, pair)) for pair in one.pairs]
        assert len(set(pairs)) == len(members) and not own_pairs & set(pairs)
        assert abs(float(displaced(own, one.taken, rows).sum()) / target - 1) < 0.02
        again = one.scale * scores.channel_share(torch.tensor(one.pairs))(scene.arm, HEAD)
        assert float((again - one.taken).abs().max()) == 0
    drawn = np.median([[np.log(mass[tuple(map(int, p))]) for p in one.pairs] for one in found])
    assert abs(drawn - np.median([np.log(mass[pair]) for pair in own_pairs])) < 0.2
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
    assert matched_sets(scene.head(HEAD), share, pool, 20.0, rows, 5, np.random.default_rng(0)) == []


# ---- both claims on a circuit whose only channels were written down


Q07, Q17 = claim("Q07"), claim("Q17")
SIZES = {"status": 24, "discovery": 90, "confirmation": 12, "sets": 32}


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


@pytest.fixture(scope="module")
def found() -> tuple[Screen, Mapping[str, q07_q17_removal.HeadRemoval]]:
    model, sae = circuit_with_constants(), circuit.dictionary()
    made = repeated.repeated_random(sum(SIZES.values()), np.arange(48), circuit.N_CTX, circuit.BOS, ("circuit",))
    sets, start = {}, 0
    for name, n in SIZES.items():
        sets[name] = repeated.collate(made[start : start + n])
        start += n
    status = head_status(model, sets["status"], target="circuit", stimulus="repeated_random")
    arm = measure_arm(model, sae, sets["discovery"].tokens, 1, circuit.HOOK)
    pairs, _ = Search(sets["discovery"], arm).stripes((0,))[0].strongest(arm, 0, 50)
    screen: Any = object.__new__(HeadScreen)  # of a screen, nothing but its channels and an example is asked for
    object.__setattr__(screen, "example", None)
    object.__setattr__(screen, "pairs", pairs.numpy())
    screened = Screen("circuit", "repeated_random", status, {"L1H0": screen}, SIZES, str)
    target: Any = SimpleNamespace(model=model, name="circuit", dictionary_for=lambda layer: (circuit.HOOK, sae))
    chosen = q07_q17_removal.choose(target, screened, sets["discovery"], 1, [0])
    measured = q07_q17_removal.measure(target, sets, 1, chosen, draws=q07_q17_removal.DRAWS, seed_parts=("circuit",))
    object.__setattr__(screen, "pairs", pairs.numpy() + 60)
    with pytest.raises(FraError, match="the screen of L1H0"):
        q07_q17_removal.choose(target, screened, sets["discovery"], 1, [0])
    return screened, measured


def beaten(one: q07_q17_removal.HeadRemoval) -> q07_q17_removal.HeadRemoval:
    """As if random sets had been found, and had done nothing: in the circuit no other live set moves any attention."""
    n = q07_q17_removal.DRAWS
    return dataclasses.replace(one, draws=np.zeros((n, 3)), draws_displaced=np.ones((n, 2)), scales=np.ones(n))


def test_the_circuits_channels_do_what_they_were_built_for(found: Any) -> None:
    screened, measured = found
    one = measured["L1H0"]
    per_row = {name: sums.sum(0) / one.rows.sum() for name, sums in one.outcomes.items()}
    # the head writes 5 x its attention to the copied token on that token's logit, and nothing else does
    assert 4 < per_row[q07_q17_removal.ZERO][0, 0] < 5
    assert per_row[q07_q17_removal.CIH][0, 0] > 0.8 * per_row[q07_q17_removal.ZERO][0, 0]
    assert abs(per_row["1 channels"][0, 0] - per_row[q07_q17_removal.CIH][0, 0] / 48) < 0.05
    assert per_row["500 channels"] == pytest.approx(per_row[q07_q17_removal.CIH], abs=0.1)
    assert per_row[q07_q17_removal.ON_STRIPE][0] == pytest.approx(per_row[q07_q17_removal.CIH][0], abs=0.1)
    assert np.abs(per_row[q07_q17_removal.OFF_STRIPE][0]).max() < 0.1 > np.abs(per_row[q07_q17_removal.SUM][0]).max()
    assert per_row[q07_q17_removal.FROZEN] == pytest.approx(per_row[q07_q17_removal.CIH])  # it has no norm
    assert one.displaced[0] > 0.7 and one.displaced[1] < 0.01
    assert len(one.draws) == 0
    given = judge(Q07, removal_evidence(Q07, screened, measured)["L1H0"])
    assert given.outcome is Outcome.INCONCLUSIVE and "was not measured" in given.reason
    evidence = removal_evidence(Q07, screened, {"L1H0": beaten(one)})
    assert judge(Q07, evidence["L1H0"]).outcome is Outcome.SUPPORTED
    assert evidence["L1H1"].outside is not None


def test_random_sets_that_do_as_much_for_what_they_move_leave_it_open(found: Any) -> None:
    """They do a hair less, and move less on the second copy: the rank of the logit alone would have let it pass."""
    screened, measured = found
    one = measured["L1H0"]
    n = q07_q17_removal.DRAWS
    close = dataclasses.replace(
        one,
        draws=np.tile(one.observed * 0.999, (n, 1)),
        draws_displaced=np.tile(one.displaced * 0.99, (n, 1)),
        scales=np.ones(n),
    )
    evidence = removal_evidence(Q07, screened, {"L1H0": close})["L1H0"]
    (conditions,) = evidence.candidates.values()
    held = {c.name: c.holds(0.05) for c in conditions}
    assert held.pop("over random live sets: logit per attention moved") is False
    assert all(held.values())
    assert judge(Q07, evidence).outcome is Outcome.INCONCLUSIVE


def test_selectivity_is_judged_against_the_crude_way(found: Any) -> None:
    screened, measured = found
    one = measured["L1H0"]
    given = judge(Q17, selectivity_evidence(Q17, screened, measured)["L1H0"])
    per_row = {name: sums.sum(0) for name, sums in one.outcomes.items()}
    assert per_row[q07_q17_removal.EQUAL][0, 0] == pytest.approx(per_row[q07_q17_removal.CIH][0, 0], rel=0.15)
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
    nothing = {name: 0.01 * rng.normal(size=sums.shape) for name, sums in one.outcomes.items()}
    idle = dataclasses.replace(one, outcomes=nothing, observed=np.zeros(3))
    given = judge(Q07, removal_evidence(Q07, screened, {"L1H0": idle})["L1H0"])
    assert given.outcome is Outcome.REFUTED, given.reason
    gated = judge(Q17, selectivity_evidence(Q17, screened, {"L1H0": idle})["L1H0"])
    assert gated.outcome is Outcome.INCONCLUSIVE and "selective about" in gated.reason
    few = dataclasses.replace(
        one, draws=one.draws[:50], scales=one.scales[:50], draws_displaced=one.draws_displaced[:50]
    )
    given = judge(Q07, removal_evidence(Q07, screened, {"L1H0": few})["L1H0"])
    assert given.outcome is Outcome.INCONCLUSIVE and "was not measured" in given.reason
