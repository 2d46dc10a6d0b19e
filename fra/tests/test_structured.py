"""The report on structured stimuli: positions are where the tokens stand, channels sum what the scores hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fra
from fra import structured
from fra.core.coded import measure_arm
from fra.errors import FraError
from fra.structured import KINDS, Structured, main, strongest_channels
from fra.targets.target import Target
from fra.tests.models import N_CTX, tiny, tiny_sae

HOOK = "blocks.1.ln1.hook_normalized"


@pytest.fixture(scope="module")
def target() -> Target:
    return fra.load_target("mini")


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_queries_stand_where_they_should(target: Target, kind: str) -> None:
    made = structured.structured(target, kind, 6)
    text = {"brackets": "(", "quotes": '"', "names": None}[kind]
    for row, control, q, k in zip(made.tokens, made.control, made.query, made.key, strict=True):
        assert 0 < k < q < len(row)
        assert row[k] != control[k]
        assert (row != control).sum() <= 2
        if text is not None:
            assert target.tokenizer.decode([int(row[k])]).strip() == text
            assert target.tokenizer.decode(row[: k + 1].tolist()).count(text) == 1
        else:
            name = target.tokenizer.decode(row[: k + 1].tolist()).split()[-1]
            assert target.tokenizer.decode(row[k + 1 : q + 1].tolist()).count(name) == 0


def test_channels_are_the_centred_contributions_to_the_score() -> None:
    """Against a dense loop: F_ij at the key less its mean over the row's keys."""
    tokens = torch.randint(1, 200, (2, N_CTX), generator=torch.Generator().manual_seed(0))
    arm = measure_arm(tiny("gpt2"), tiny_sae(HOOK), tokens, 1, HOOK)
    made = Structured("brackets", tokens, tokens, torch.tensor([20, 15]), torch.tensor([4, 9]))
    found = strongest_channels(arm, 1, made, n=5)
    a = arm.codes.dense().double().numpy()
    U, V = (part.double().numpy() for part in arm.couplings(1))
    G = U @ V.T
    total = np.zeros_like(G)
    for doc, (t, s) in enumerate([(20, 4), (15, 9)]):
        live = (a[doc, t] != 0)[:, None] & (a[doc, s] != 0)[None, :]
        total += live * G * np.outer(a[doc, t], a[doc, s] - a[doc, : t + 1].mean(0)) / 2
    i, j = (int(part) for part in found[0]["channel"].split(" -> "))
    assert found[0]["nats"] == pytest.approx(total.max(), abs=2e-4)
    assert total[i, j] == pytest.approx(total.max(), abs=1e-6)


def test_bad_input(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FraError, match="no structured stimulus"):
        structured.structured(target, "poems", 2)
    assert main(["no-such-target"]) == 2
    assert main(["mini", "-n", "0"]) == 2
    assert "at least one sentence" in capsys.readouterr().err


def test_report_says_that_nothing_is_tested(target: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mini", "-n", "3", "-o", str(tmp_path / "out.json")]) == 0
    assert "nothing is tested" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text())
    assert len(rows) == len(KINDS) * len(target.heads)
    assert all(row["channels"] for row in rows)
