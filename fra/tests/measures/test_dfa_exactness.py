"""D02, D03 and D17 say yes where attribution is right, and no where any part of it is missing."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fra
from fra.attribution import head_outputs, upstream
from fra.claim import Outcome, judge
from fra.errors import FraError
from fra.measures.identities import d02_d03_d17_exactness
from fra.measures.identities.designs import Recursion
from fra.tests.claims import claim
from fra.tests.models import D_MODEL, build_sae, model_folder, random_tokens
from fra.tests.tiny_targets import write_target, write_text

DOCUMENTS = [random_tokens(18, seed) for seed in range(3)]


def target(kind: str, folder: Path, hooks: tuple[str, ...] | None = None) -> Any:
    at_input = "hook_resid_pre" if kind == "no_layernorm" else "ln1.hook_normalized"
    hooks = hooks or (
        *(f"blocks.{n}.attn.hook_z" for n in (0, 1)),
        *(f"blocks.{n}.{at_input}" for n in (0, 1)),
    )
    dictionaries = {}
    for number, hook in enumerate(hooks):
        options = {"reshape_activations": "hook_z"} if hook.endswith("hook_z") else {}
        place = folder / "saes" / hook
        dictionaries[hook] = build_sae("topk", D_MODEL, hook, place, seed=number, **options)
    return fra.load_target(write_target(folder, model_folder(kind), dictionaries, write_text(folder / "text")))


def outcomes(made: Any) -> dict[str, Outcome]:
    designs = {
        "head": (claim("D02"), d02_d03_d17_exactness.head_errors),
        "source": (claim("D03"), d02_d03_d17_exactness.source_errors),
        "recursive": (claim("D17"), partial(d02_d03_d17_exactness.recursive_errors, design=Recursion())),
    }
    found = {}
    for name, (own, errors) in designs.items():
        found[name] = judge(own, d02_d03_d17_exactness.evidence(own, made, DOCUMENTS, errors)).outcome
    return found


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "no_layernorm"])
def test_attribution_is_exact_in_single_precision(kind: str, tmp_path: Path) -> None:
    made = target(kind, tmp_path)
    assert set(outcomes(made).values()) == {Outcome.SUPPORTED}
    rows = d02_d03_d17_exactness.source_errors(made, "blocks.1.attn.hook_z", DOCUMENTS[0])
    assert ("key-value head" in rows) == (kind in ("llama", "gemma2"))
    assert ("b_V" in rows) == (kind in ("gpt2", "no_layernorm"))
    traced = d02_d03_d17_exactness.recursive_errors(made, "blocks.1.attn.hook_z", DOCUMENTS[0], Recursion())
    expected = {"embed", "encoder bias", "feature", "bias", "error"}
    assert expected <= set(traced)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "no_layernorm"])
def test_features_of_what_attention_writes_are_attributed_too(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = ("blocks.0.hook_attn_out", "blocks.1.hook_attn_out")
    made = target(kind, tmp_path, hooks)
    assert set(outcomes(made).values()) == {Outcome.SUPPORTED}
    traced = d02_d03_d17_exactness.recursive_errors(made, hooks[1], DOCUMENTS[0], Recursion())
    assert {"embed", "encoder bias", "feature", "bias", "error"} <= set(traced)
    if kind == "gemma2":
        return
    observe = head_outputs.observe

    def without_b_O(*args: Any) -> Any:
        o = observe(*args)
        return dataclasses.replace(o, encoder=dataclasses.replace(o.encoder, b_O=None))

    monkeypatch.setattr(d02_d03_d17_exactness.attribution, "observe", without_b_O)
    found = outcomes(made)
    assert found["head"] == found["source"] == Outcome.REFUTED


def test_a_missing_part_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = target("gpt2", tmp_path)
    observe = head_outputs.observe

    def without_bias(*args: Any) -> Any:
        o = observe(*args)
        return dataclasses.replace(o, encoder=dataclasses.replace(o.encoder, bias=o.encoder.bias * 0.99))

    with monkeypatch.context() as patch:
        patch.setattr(d02_d03_d17_exactness.attribution, "observe", without_bias)
        found = outcomes(made)
    assert found["head"] == found["source"] == Outcome.REFUTED
    freeze = upstream.freeze_below

    def without_mlp(*args: Any) -> Any:
        layers, embedded = freeze(*args)
        return [dataclasses.replace(layer, mlp=0 * layer.mlp) for layer in layers], embedded

    with monkeypatch.context() as patch:
        patch.setattr(upstream, "freeze_below", without_mlp)
        assert outcomes(made) == {
            "head": Outcome.SUPPORTED,
            "source": Outcome.SUPPORTED,
            "recursive": Outcome.REFUTED,
        }


def test_a_silent_head_leaves_nothing_out_and_a_silent_dictionary_is_refused(tmp_path: Path) -> None:
    hook = "blocks.1.attn.hook_z"
    made, own = target("gpt2", tmp_path, (hook,)), claim("D02")
    with torch.no_grad():
        made.dictionaries[hook].W_enc.view(4, -1, made.dictionaries[hook].cfg.d_sae)[2] = 0
    assert "head 2" not in d02_d03_d17_exactness.head_errors(made, hook, DOCUMENTS[0])
    assert outcomes(made)["head"] == Outcome.SUPPORTED
    with torch.no_grad():
        made.dictionaries[hook].b_enc.fill_(-1e3)
    recursive = partial(d02_d03_d17_exactness.recursive_errors, design=Recursion())
    for errors in (d02_d03_d17_exactness.source_errors, recursive):
        with pytest.raises(FraError, match=r"no feature .* fires in a document"):
            d02_d03_d17_exactness.evidence(own, made, DOCUMENTS, errors)


def test_without_a_dictionary_of_head_outputs_it_cannot_run(tmp_path: Path) -> None:
    made = target("gpt2", tmp_path, ("blocks.1.ln1.hook_normalized",))
    own = claim("D02")
    found = judge(own, d02_d03_d17_exactness.evidence(own, made, DOCUMENTS, d02_d03_d17_exactness.head_errors))
    assert found.outcome == Outcome.CANNOT_RUN and "no dictionary of head outputs" in found.reason


def test_yardstick_is_the_sum_of_absolute_products(tmp_path: Path) -> None:
    """An error of one part in a hundred of one head's output is what it is in units of the products."""
    made = target("gpt2", tmp_path)
    hook = "blocks.1.attn.hook_z"
    sae, tokens = made.dictionaries[hook], DOCUMENTS[0]
    o = head_outputs.observe(made.model, sae, tokens)
    z, W = o.z[0].flatten(1).double(), sae.W_enc.detach().double()
    constant = (sae.b_enc - sae.b_dec @ sae.W_enc).detach().double()
    off = torch.zeros(18, 96).double()
    for t in range(18):
        for f in range(0, 96, 7):
            products = sum(abs(float(z[t, d] * W[d, f])) for d in range(32)) + abs(float(constant[f]))
            off[t, f] = abs(float(constant[f])) / products
    found = d02_d03_d17_exactness.head_errors(made, hook, tokens)
    assert found["bias"] >= float(off.max()) * 0.999


def test_one_wrong_dictionary_is_enough(tmp_path: Path) -> None:
    made, own = target("gpt2", tmp_path), claim("D02")
    for spoilt, outcome in (
        ({}, Outcome.SUPPORTED),
        ({"complete": 1e-3}, Outcome.REFUTED),
        ({"head 1": 1e-7}, Outcome.REFUTED),
        ({"complete": float("nan")}, Outcome.INCONCLUSIVE),
    ):
        rows = {"blocks.0.attn.hook_z": {"complete": 1e-8, "head 1": 1e-2} | spoilt}

        def errors(made: Any, hook: str, tokens: Any, rows: Any = rows) -> dict[str, float]:
            return rows.get(hook, {"complete": 1e-8, "head 1": 1e-2})

        found = d02_d03_d17_exactness.evidence(own, made, DOCUMENTS, errors)
        assert judge(own, found).outcome is outcome
