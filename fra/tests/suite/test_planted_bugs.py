"""Wrong code is caught (CLAIMS M04): each bug is planted; something refuses to go on, or the verdict turns."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fra.claim import Outcome, judge
from fra.core import frozen as heads
from fra.core import weights
from fra.core.coded import Arm, measure_arm
from fra.core.frozen import freeze
from fra.core.resolve import resolve
from fra.core.weights import QKWeights
from fra.errors import FraError
from fra.measures.channels import q04_q05_sets
from fra.search import atoms, nulls
from fra.search.channels import measure_arms
from fra.search.screen import LayerScreen
from fra.stimuli import repeated
from fra.tests import circuit
from fra.tests.induction.test_cih_circuit import CIH_SET, screened
from fra.tests.models import random_tokens, tiny, tiny_sae

Change = Callable[[QKWeights], QKWeights]

# the architecture, the layer and the bug
BUGS: dict[str, tuple[str, int, Change]] = {
    "no scale": ("gpt2", 0, lambda w: dataclasses.replace(w, scale=1.0)),
    "no query bias": ("gpt2", 0, lambda w: dataclasses.replace(w, b_q=torch.zeros_like(w.b_q))),
    "no key bias": ("gpt2", 0, lambda w: dataclasses.replace(w, b_k=torch.zeros_like(w.b_k))),
    "no centring": ("gpt2", 0, lambda w: dataclasses.replace(w, W_q=w.W_q + 0.1)),
    "wrong key-value head": ("llama", 0, lambda w: dataclasses.replace(w, W_k=w.W_k.roll(1, 0), b_k=w.b_k.roll(1, 0))),
    "no softcap": ("gemma2", 0, lambda w: dataclasses.replace(w, softcap=None)),
    "no window": ("gemma2", 1, lambda w: dataclasses.replace(w, window=None)),
    "no QK-norm": ("qwen3", 0, lambda w: dataclasses.replace(w, norm_q=None)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_wrong_weights_are_refused(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, layer, change = BUGS[bug]
    model, hook = tiny(kind), f"blocks.{layer}.hook_resid_pre"
    right = weights.qk_weights
    freeze(model, random_tokens()[None], layer, hook)  # the right code goes through
    monkeypatch.setattr(heads, "qk_weights", lambda *args: change(right(*args)))
    with pytest.raises(FraError, match=r"cannot be reproduced|masks other keys"):
        freeze(model, random_tokens()[None], layer, hook)


@pytest.mark.parametrize(
    ("hook", "options", "says"),
    [
        ("blocks.1.hook_resid_pre", {}, "attention input of layer 1"),
        ("blocks.0.attn.hook_z", {"reshape_activations": "hook_z"}, "head outputs"),
        ("blocks.0.hook_mlp_out", {}, "hook_mlp_out"),
    ],
)
def test_a_dictionary_of_another_hook_is_refused(hook: str, options: dict[str, str], says: str) -> None:
    sae = copy.deepcopy(tiny_sae("blocks.0.hook_resid_pre"))  # others are given the same one
    sae.cfg.metadata.hook_name = hook
    for name, value in options.items():
        setattr(sae.cfg, name, value)
    with pytest.raises(FraError, match=says):
        resolve(tiny("gpt2"), sae, random_tokens(), layer=0, head=0)


def batches(seed: str, **sizes: int) -> dict[str, repeated.Batch]:
    return {
        name: repeated.collate(repeated.repeated_random(n, np.arange(48), circuit.N_CTX, circuit.BOS, (seed, name)))
        for name, n in sizes.items()
    }


def test_choosing_on_the_documents_that_are_measured_is_refused() -> None:
    model, sae = circuit.model(), circuit.dictionary()
    sets = batches("overlap", discovery=40, sets=22)
    mixed = repeated.collate(
        repeated.repeated_random(40, np.arange(48), circuit.N_CTX, circuit.BOS, ("overlap", "discovery"))[-3:]
        + repeated.repeated_random(19, np.arange(48), circuit.N_CTX, circuit.BOS, ("overlap", "own"))
    )
    discovery = measure_arm(model, sae, sets["discovery"].tokens, 1, circuit.HOOK)
    wrong, right = (measure_arms(model, sae, batch, 1, circuit.HOOK) for batch in (mixed, sets["sets"]))
    for arms in ((wrong, right), (right, wrong)):
        with pytest.raises(FraError, match="3 documents serve both"):
            LayerScreen(sets["discovery"], discovery, *arms, seed_parts=("overlap",), tih=[0])
    LayerScreen(sets["discovery"], discovery, right, right, seed_parts=("overlap",), tih=[0])


def test_a_dead_scramble_is_refused() -> None:
    model = circuit.model()
    with torch.no_grad():
        model.blocks[1].attn.W_K[0] = 0.0
    frozen = freeze(model, batches("dead", one=2)["one"].tokens, 1, circuit.HOOK)
    with pytest.raises(FraError, match="dead"):
        nulls.stretch_to_match(frozen, 0, torch.eye(frozen.W_k.shape[-1]))


def test_dead_random_atoms_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atoms, "draw_atoms", lambda n, generator, like: torch.zeros_like(like))
    model, sae = circuit.model(), circuit.dictionary()
    sets = batches("atoms", discovery=40, sets=22)
    discovery = measure_arm(model, sae, sets["discovery"].tokens, 1, circuit.HOOK)
    arms = measure_arms(model, sae, sets["sets"], 1, circuit.HOOK)
    layer = LayerScreen(sets["discovery"], discovery, arms, arms, seed_parts=("atoms",), tih=[0])
    with pytest.raises(FraError, match="without anything live"):
        _ = layer.over_atoms


def test_couplings_without_their_scale_turn_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a circuit too weak for the bar the right code does not say SUPPORTED; with the scale forgotten it would."""

    def verdict() -> Outcome:
        found = screened(circuit.model(strength=0.4))
        tih = found.status | {"L1H0": dataclasses.replace(found.status["L1H0"], status="TIH")}
        return judge(
            CIH_SET, q04_q05_sets.set_evidence(CIH_SET, dataclasses.replace(found, status=tih))["L1H0"]
        ).outcome

    assert verdict() is Outcome.REFUTED
    right = Arm.couplings

    def unscaled(arm: Arm, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        U, V = right(arm, head)
        return U / arm.frozen.scale, V

    monkeypatch.setattr(Arm, "couplings", unscaled)
    assert verdict() is not Outcome.REFUTED
