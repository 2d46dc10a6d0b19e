"""C01 to C03 on the hand-built circuit through crosscoders that are made by hand: planted yes and no, and each part
against its definition.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fra
from fra import crosscoders
from fra.claim import Outcome, judge
from fra.core.coded import measure_arm
from fra.induction.cih import Screen
from fra.induction.status import HeadStatus
from fra.measures.channels.c02_c03_crosscoders import (
    BOTH,
    NAMES,
    InExclusive,
    exclusive_evidence,
    in_exclusive,
    matched_cells,
    relabelled,
)
from fra.measures.channels.q20_seeds import across, seeds_evidence
from fra.measures.channels.transfer_designs import ChannelSet, Exclusive
from fra.measures.identities import c01_crosscoders
from fra.search.channels import HeadOnArms, measure_arms
from fra.search.search import Search
from fra.stimuli import repeated
from fra.tests import circuit
from fra.tests.claims import claim

D = circuit.D_MODEL
MADE = repeated.repeated_random(130, np.arange(48), circuit.N_CTX, circuit.BOS, ("crosscoders",))
DISCOVERY, MEASURED = repeated.collate(MADE[:50]), repeated.collate(MADE[50:])
MEAN = torch.linspace(-0.2, 0.2, 2 * D).view(2, D)


def placed(share: torch.Tensor, order: torch.Tensor | None = None, directions: torch.Tensor | None = None) -> Any:
    """The circuit's dictionary as slot 1 of a crosscoder, a mean subtracted; slot 0 gives no code anything, and has of
    each feature's decoder what leaves slot 1 this share.
    """
    eye = torch.eye(D) if directions is None else directions
    eye = eye if order is None else eye[order]
    other = eye * ((1 - share) / share)[:, None]
    encoder = torch.stack((torch.zeros(D, D), eye.T))
    b_enc = -0.01 + MEAN[1] @ eye.T
    crosscoder = crosscoders.Crosscoder(
        (crosscoders.Slot("before", circuit.HOOK), crosscoders.Slot("after", circuit.HOOK)),
        encoder, torch.stack((other, eye), dim=1), b_enc, -MEAN, MEAN,
    )  # fmt: skip
    return crosscoders.Placed(crosscoder, 1, {"before": circuit.model()})


def screen() -> Screen:
    status = {"L1H0": HeadStatus("L1H0", "TIH", 0.9, 0.9, 0.9, {})}
    return Screen("circuit", "repeated_random", status, {}, {}, str)


def through(one: Any, head: int = 0) -> InExclusive:
    model = circuit.model()
    search = Search(DISCOVERY, measure_arm(model, one, DISCOVERY.tokens, 1, circuit.HOOK))
    arms = measure_arms(model, one, MEASURED, 1, circuit.HOOK)
    return in_exclusive(search, arms, one, head, ChannelSet(), Exclusive(), ("test",))


def test_codes_through_the_crosscoder_are_the_dictionarys() -> None:
    model, tokens = circuit.model(), DISCOVERY.tokens[:3]
    arm = measure_arm(model, placed(torch.full((D,), 0.5)), tokens, 1, circuit.HOOK)
    own = measure_arm(model, circuit.dictionary(), tokens, 1, circuit.HOOK)
    torch.testing.assert_close(arm.codes.dense(), own.codes.dense(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("permuted", "outcome"), [(True, Outcome.SUPPORTED), (False, Outcome.REFUTED)])
def test_c02_planted(permuted: bool, outcome: Outcome) -> None:
    """The same features in another order are the same channels; random directions are none of them."""
    model, generator = circuit.model(), torch.Generator().manual_seed(2)
    half = torch.full((D,), 0.5)
    if permuted:
        one = placed(half, torch.randperm(D, generator=generator))
    else:
        one = placed(half, directions=torch.linalg.qr(torch.randn(D, D, generator=generator))[0])
    searches, arms = [], []
    for sae in (circuit.dictionary(), one):
        searches.append(Search(DISCOVERY, measure_arm(model, sae, DISCOVERY.tokens, 1, circuit.HOOK)))
        arms.append(measure_arms(model, sae, MEASURED, 1, circuit.HOOK))
    found = across(searches, arms, [0], ChannelSet(), ("test",))
    own = claim("C02", min_sources=20)
    evidence = seeds_evidence(own, screen(), found, None, every=BOTH, names=NAMES)["L1H0"]
    verdict = judge(own, evidence)
    assert verdict.outcome is outcome, verdict.reason
    assert set(evidence.detail["own sets (nats a row)"]) and len(evidence.detail["own sets (nats a row)"]) == 2


def test_c03_planted() -> None:
    """Features of the induction channels exclusive to the later model, others shared: yes. All shared: no. All
    exclusive: no more than of others that could be called so.
    """
    token, shared = torch.arange(D) < circuit.D_VOCAB, torch.full((D,), 0.5)
    ours = shared.where(~token, torch.tensor(0.99))
    late = through(placed(shared))
    own = claim("C03", min_sources=20)
    outcomes = {}
    for name, share in {"exclusive": ours, "shared": shared, "everything": torch.full((D,), 0.99)}.items():
        one = through(placed(share))
        outcomes[name] = judge(own, exclusive_evidence(own, screen(), {"L1H0": (one, late)}, None)["L1H0"])
        assert late.part.sum() == 0
    assert outcomes["exclusive"].outcome is Outcome.SUPPORTED, outcomes["exclusive"].reason
    assert outcomes["shared"].outcome is Outcome.REFUTED, outcomes["shared"].reason
    assert outcomes["everything"].outcome is not Outcome.SUPPORTED
    # Between two late checkpoints as much: nothing that training added then.
    both = judge(own, exclusive_evidence(own, screen(), {"L1H0": (one, one)}, None)["L1H0"])
    assert both.outcome is not Outcome.SUPPORTED


def test_the_part_is_what_removing_its_channels_does() -> None:
    share = torch.full((D,), 0.5)
    share[: circuit.D_VOCAB : 2] = 0.95
    one, given = through(placed(share)), placed(share)
    exclusive = one.pairs[(share.numpy()[one.pairs] > 0.9).any(1)]
    assert 0 < len(exclusive) < len(one.pairs)
    assert one.exclusive.sum() == len(exclusive)
    on = HeadOnArms(measure_arms(circuit.model(), given, MEASURED, 1, circuit.HOOK), 0)
    for pairs, nats in ((exclusive, one.part), (one.pairs, one.together)):
        alone = on.removed_together(torch.from_numpy(np.ascontiguousarray(pairs))).nats[:, 0]
        np.testing.assert_allclose(nats, alone, rtol=1e-6)
    assert one.features[0] == int((share[torch.unique(on.sides[0].codes.feature)] > 0.9).sum()) or one.features[0] > 0


def test_relabelling_keeps_norms_and_activity() -> None:
    rng = np.random.default_rng(1)
    norm, count = rng.uniform(0, 1, 400), rng.integers(0, 90, 400)
    exclusive = norm > 0.6
    cells = matched_cells(norm, count, 4)
    assert sorted(np.concatenate(cells)) == sorted(np.flatnonzero(count > 0))
    drawn = relabelled(exclusive, cells, rng)
    for cell in cells:
        assert drawn[cell].sum() == exclusive[cell].sum()
    assert not drawn[count == 0].any()
    mixed = [cell for cell in cells if 0 < exclusive[cell].sum() < len(cell)]
    assert mixed and any((drawn[cell] != exclusive[cell]).any() for cell in mixed)
    spans = [(norm[cell].min(), norm[cell].max()) for cell in cells]
    assert max(high - low for low, high in spans) < 0.4


def c01(one: Any, *, mean: torch.Tensor | None = MEAN) -> Any:
    target: Any = SimpleNamespace(
        model=circuit.model().to(torch.float64), n_layers=2, n_heads=2, crosscoders={"cc": one}
    )
    documents = [row[:20] for row in DISCOVERY.tokens[:3]]
    own = claim("C01")
    return own, c01_crosscoders.evidence(own, target, documents, frozenset(range(2)))


def test_c01_planted() -> None:
    one = placed(torch.full((D,), 0.5))
    own, found = c01(one)
    assert judge(own, found["L0H0"]).outcome is Outcome.CANNOT_RUN
    verdict = judge(own, found["L1H0"])
    assert verdict.outcome is Outcome.SUPPORTED, verdict.reason
    assert found["L1H0"].n == 3
    # A mean that is put into the bias term twice is no sum any more.
    twice = fra.crosscoders.Crosscoder.codes

    def wrong(self: Any, activations: torch.Tensor, slot: int) -> Any:
        codes = twice(self, activations, slot)
        object.__setattr__(codes, "bias", codes.bias + self.mean[slot])
        return codes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fra.crosscoders.Crosscoder, "codes", wrong)
        own, found = c01(one)
        assert judge(own, found["L1H0"]).outcome is Outcome.REFUTED
