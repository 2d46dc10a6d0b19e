"""Rounding refutes no identity: what misses a bar is measured in float64, and a real error is found there too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fra
from fra.claim import Outcome, judge
from fra.errors import FraError
from fra.measures.identities import precision, s01_sentences
from fra.measures.identities.q01_q18_exactness import DROPPED, errors, sums_evidence
from fra.stimuli.natural import natural_documents
from fra.targets import Target
from fra.tests.claims import claim
from fra.tests.intervening import double
from fra.tests.models import build_model, random_tokens, tiny_sae
from fra.tests.tiny_targets import signed_axes, write_target, write_text
from fra.verdicts.claim import Evidence
from fra.verdicts.conditions import exact

HOOK = "blocks.1.ln1.hook_normalized"
Q01, S01 = claim("Q01"), claim("S01")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("precision")
    build_model("llama", folder / "m")
    signed_axes(folder / "s", HOOK)
    write_text(folder / "text", {f"s{n}-1": "one and two make more than one, said three." for n in range(8)})
    return write_target(folder, folder / "m", {HOOK: folder / "s"}, folder / "text")


def measured(target: Target, layers: frozenset[int], off: float = 0.0) -> dict[str | None, Evidence]:
    """Q01 at two heads; off: what a wrong computation would add to every error."""
    assert 1 in layers
    documents, sae = natural_documents(target, Q01.n), target.dictionaries[HOOK]
    found: dict[str | None, Evidence] = {}
    for head in (0, 3):
        rows = [errors(target.model, sae, tokens, 1, head) for tokens in documents]
        rows = [row | {"complete": row["complete"] + off} for row in rows]
        found[f"L1H{head}"] = sums_evidence(Q01, f"L1H{head}", rows, ("complete",), DROPPED, {})
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_identity_is_supported_in_any_precision(dtype: str, file: Path) -> None:
    target = fra.load_target(file, dtype=dtype)
    for evidence in precision.settled(target, measured).values():
        assert judge(Q01, evidence).outcome == Outcome.SUPPORTED
        assert ("precision" in evidence.detail) == (dtype != "float32")
    alone = measured(target, frozenset({1}))
    assert all(bool(precision.missed(evidence)) == (dtype != "float32") for evidence in alone.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_sum_is_refuted_in_any_precision(dtype: str, file: Path) -> None:
    target = fra.load_target(file, dtype=dtype)
    found = precision.settled(target, lambda target, layers: measured(target, layers, off=0.01))
    assert {judge(Q01, evidence).outcome for evidence in found.values()} == {Outcome.REFUTED}


def test_what_falls_with_precision_and_not_enough_is_undecided(file: Path) -> None:
    target = fra.load_target(file, dtype="bfloat16")

    def rounds(target: Target, layers: frozenset[int]) -> dict[str | None, Evidence]:
        return measured(target, layers, off=1e-2 if target.dtype == "bfloat16" else 1e-5)

    for evidence in precision.settled(target, rounds).values():
        verdict = judge(Q01, evidence)
        assert verdict.outcome == Outcome.INCONCLUSIVE
        assert verdict.reason.startswith("limited by precision: 'error' is 1e-05 in float64 and 0.01")


def test_a_device_without_float64_decides_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(target: Target) -> Target:
        raise FraError("this device has no float64: use the CPU.")

    monkeypatch.setattr(precision, "in_double", refuses)
    found = precision.settled(fra.load_target(file, dtype="bfloat16"), measured)
    for evidence in found.values():
        assert judge(Q01, evidence).outcome == Outcome.INCONCLUSIVE
        assert "limited by precision: bfloat16 does not reach the bar" in str(evidence.undecided)


def test_a_control_that_rounding_hides_counts_too() -> None:
    conditions = (
        exact("error", 1e-9, 1e-6, above=False),
        exact("error with a term left out", 1e-6, 1e-5),
    )
    evidence = Evidence(claim=Q01, head="L0H0", candidates={"every term": conditions}, n=3)
    assert precision.missed(evidence) == ["error with a term left out"]
    met = replace(conditions[1], effect=1.0, low=1.0, high=1.0)
    assert precision.missed(replace(evidence, candidates={"every term": (conditions[0], met)})) == []


def test_sentences_are_undecided_where_the_softmax_rounds() -> None:
    """The Bridge takes softmax in float32; on this head of Gemma 2 the finite difference feels it."""
    tokens, segment = random_tokens(24), torch.arange(24) // 4
    sae = tiny_sae(HOOK, dtype="float64")
    rows = s01_sentences.identities(double("gemma2"), sae, tokens, segment, 1, ("test",))
    assert all(0 < row[s01_sentences.ROUNDING] < 0.1 for row in rows)
    plain = rows[0] | {"finite difference": 0.9 * rows[0][s01_sentences.ROUNDING]}
    row = plain | {s01_sentences.ROUNDING: max(2e-4, plain[s01_sentences.ROUNDING]), "finite difference": 1.5e-4}
    undecided = s01_sentences.evidence(S01, "L1H0", [row] * 3)
    assert judge(S01, undecided).outcome == Outcome.INCONCLUSIVE and "softmax rounds" in str(undecided.undecided)
    wrong = s01_sentences.evidence(S01, "L1H0", [row | {"finite difference": 0.2}] * 3)
    assert judge(S01, wrong).outcome == Outcome.REFUTED
