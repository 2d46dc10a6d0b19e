"""On the embedded target's own activations the screen must say no where nothing is there: scrambled heads, the
rescaled twin.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fra.claim import Outcome, judge
from fra.core.coded import Arm, measure_arm
from fra.core.frozen import FrozenLayer
from fra.induction import cih
from fra.induction.status import HeadStatus
from fra.measures.channels import q04_q05_sets
from fra.search.channels import Arms, measure_arms
from fra.search.nulls import random_rotation, row_spread, scramble, stretch_to_match
from fra.search.screen import LayerScreen
from fra.stimuli import repeated as stimuli
from fra.stimuli import sets as document_sets
from fra.stimuli.designs import RepeatedSets
from fra.targets.target import Target, load_target
from fra.tests.claims import claim

LAYER = 1
DESIGN = RepeatedSets(status=1, discovery=60, made_confirmation=280, sets=60)
"""So many that the induction heads, left as they are, would be SUPPORTED: a channel is live in two documents of five,
and fifty are tested together.
"""
CIH_SET, CIH_CHANNEL = claim("Q04"), claim("Q05", n=DESIGN.made_confirmation)


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target("mini")


@pytest.fixture(scope="module")
def sets(target: Target) -> dict[str, stimuli.Batch]:
    return document_sets.documents(target, "repeated_random", DESIGN)


def screened(
    sets: dict[str, stimuli.Batch],
    discovery: Arm,
    arms: list[Arms],
    heads: list[int],
    change: Callable[[FrozenLayer], FrozenLayer],
    status: str,
) -> cih.Screen:
    """The screen of a layer whose weights were changed, every head said to be what `status` says."""

    def changed(arm: Arm) -> Arm:
        return Arm(change(arm.frozen), arm.codes)

    both = [Arms(a.batch, changed(a.repeated), changed(a.control)) for a in arms]
    tih = heads if status == "TIH" else []
    layer = LayerScreen(sets["discovery"], changed(discovery), *both, seed_parts=("n",), tih=tih)
    found = cih.screen_layer(layer, heads)
    statuses = {f"L{LAYER}H{h}": HeadStatus(f"L{LAYER}H{h}", status, 0.0, 0.0, 0.0, {}) for h in heads}
    return cih.Screen("mini", "repeated_random", statuses, found, {}, str, layers=lambda _: layer)


def test_scrambled_heads_are_not_supported(target: Target, sets: dict[str, stimuli.Batch]) -> None:
    """The layer with the induction heads, every key map turned by a random rotation of its own: neither claim says
    yes.
    """
    hook, sae = target.dictionary_for(LAYER)
    discovery = measure_arm(target.model, sae, sets["discovery"].tokens, LAYER, hook)
    arms = [measure_arms(target.model, sae, sets[name], LAYER, hook) for name in ("confirmation", "sets")]
    heads = [3, 4, 5]  # two induction heads among them
    generator = torch.Generator().manual_seed(1)
    turns = {h: random_rotation(discovery.frozen.W_k.shape[-1], generator, discovery.frozen.W_k) for h in heads}
    stretches = {h: stretch_to_match(discovery.frozen, h, turns[h]) for h in heads}

    def change(frozen: FrozenLayer) -> FrozenLayer:
        for h in heads:
            frozen = scramble(frozen, h, turns[h], stretches[h])
        return frozen

    as_others = screened(sets, discovery, arms, heads, change, "not a TIH")
    for name, own in q04_q05_sets.channel_evidence(CIH_CHANNEL, as_others).items():
        assert judge(CIH_CHANNEL, own).outcome is not Outcome.SUPPORTED, name
    as_tih = screened(sets, discovery, arms, heads, change, "TIH")
    for name, own in q04_q05_sets.set_evidence(CIH_SET, as_tih).items():
        assert judge(CIH_SET, own).outcome is not Outcome.SUPPORTED, name


def test_the_rescaled_twin_is_not_supported(target: Target, sets: dict[str, stimuli.Batch], tmp_path: Path) -> None:
    """The untrained twin with its scores stretched to the trained heads' spread has heads, text and dictionary, and
    no channel.
    """
    from fixtures.mini.build.train_model import untrained
    from fra.targets.models import load_model

    folder = target.model_folder
    assert folder is not None
    hook, sae = target.dictionary_for(LAYER)
    trained = measure_arm(target.model, sae, sets["sets"].tokens, LAYER, hook).frozen
    untrained().save_pretrained(tmp_path)
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    twin = load_model(tmp_path, "cpu", torch.float32, target.processing)
    discovery = measure_arm(twin, sae, sets["discovery"].tokens, LAYER, hook)
    arms = [measure_arms(twin, sae, sets[name], LAYER, hook) for name in ("confirmation", "sets")]
    heads = [4, 5]
    factors = {h: row_spread(trained, h) / row_spread(discovery.frozen, h) for h in heads}
    assert min(factors.values()) > 2, "the twin's scores are those of a trained head: nothing was rescaled"

    def change(frozen: FrozenLayer) -> FrozenLayer:
        W_k, b_k = frozen.W_k.clone(), frozen.b_k.clone()
        for h, factor in factors.items():
            W_k[h] *= factor
            b_k[h] *= factor
        return dataclasses.replace(frozen, W_k=W_k, b_k=b_k)

    found = screened(sets, discovery, arms, heads, change, "not a TIH")
    for name, own in q04_q05_sets.channel_evidence(CIH_CHANNEL, found).items():
        assert judge(CIH_CHANNEL, own).outcome is not Outcome.SUPPORTED, name
