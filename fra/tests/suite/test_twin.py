"""The untrained twin as a target of its own, at tiny size, and the table that its ledger is held against."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

import fra
from fixtures.mini.build import expected, recipe, scrambled, train_dictionaries, twin
from fixtures.mini.build.train_model import tensors_hash
from fra.errors import FraError
from fra.targets.admission import admit, sample
from fra.targets.target import Target
from fra.tests.tiny_targets import one_sentence
from fra.tests.verdicts.test_claim import BAD, GOOD, evidence
from fra.tests.verdicts.test_ledger import make_ledger

ROOT = Path(__file__).resolve().parents[3]
TINY = {
    "D_SAE": 128,
    "SEEDS_D_SAE": 64,
    "TOP_K": 16,
    "TOP_K_AT": {recipe.SEEDS_HOOK: 20},
    "SAE_TOKENS": 20_480,
    "SAE_TOKENS_AT": {},
    "SEEDS_TOKENS": 1_280,
    "SAE_BATCH": 128,
    "SAE_LEARNING_RATE": 1e-2,
    "SAE_STORED_TOKENS": 4_096,
    "TWIN_SHARE": 1.0,
}


@pytest.fixture(scope="module")
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TINY.items():
            patch.setattr(recipe, name, value)
        yield


@pytest.fixture(scope="module")
def built(tiny: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return twin.build(tmp_path_factory.mktemp("build") / "twin")


@pytest.fixture(scope="module")
def target(built: Path) -> Target:
    return fra.load_target(built)


def test_the_twin_is_the_twin(built: Path) -> None:
    stated = json.loads((ROOT / "fixtures/mini/figures.json").read_text())["twin_sha256"]
    loaded = GPT2LMHeadModel.from_pretrained(built.parent / "model")
    assert tensors_hash(loaded) == stated


def test_its_folder_is_a_target_like_mini_but_for_what_is_known(built: Path, target: Target) -> None:
    own = tomllib.loads(built.read_text())
    mini = tomllib.loads((ROOT / "fixtures/targets/mini.toml").read_text())
    assert own["name"] == "twin"
    assert "heads" not in own and "study" not in own
    assert own["size"] == mini["size"]
    for table in ("dictionary", "seed"):
        assert [entry["hook"] for entry in own[table]] == [entry["hook"] for entry in mini[table]]
    trained = fra.load_target("mini")
    assert target.documents() == trained.documents()
    assert (target.processing, target.prepend_bos) == (trained.processing, trained.prepend_bos)
    assert target.encode("the sea and the ship") == trained.encode("the sea and the ship")
    assert target.known_tih == ()


def test_its_dictionaries_are_its_own(target: Target) -> None:
    found = {quality.hook: quality for quality in admit(target).dictionaries}
    assert set(found) == set(train_dictionaries.hooks())
    for hook, quality in found.items():
        assert 0 < quality.l0 <= recipe.TOP_K_AT.get(hook, recipe.TOP_K)
        assert quality.explained_variance > 0.1, hook
        assert target.dictionaries[hook].cfg.metadata.model_name == "twin"
    weights = [sae.W_dec for sae in target.seed_dictionaries(recipe.SEEDS_HOOK)]
    assert len(weights) == len(recipe.SEEDS)
    assert not torch.equal(weights[0], weights[1])


def test_a_build_goes_on_where_it_was_stopped(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "twin"
    shutil.copytree(built.parent, folder)
    assert not (folder / "activations").exists()
    whole = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert twin.build(folder) == folder / twin.TARGET
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == whole, "what is finished is left alone"
    last = folder / "saes_seeds" / f"{recipe.SEEDS_HOOK}.{recipe.SEEDS[-1]}"
    kept = folder / "saes" / recipe.SEEDS_HOOK / "sae_weights.safetensors"
    before, own = kept.stat().st_mtime_ns, (last / "sae_weights.safetensors").read_bytes()
    shutil.rmtree(last)
    (folder / twin.TARGET).unlink()
    assert twin.build(folder) == folder / twin.TARGET
    assert kept.stat().st_mtime_ns == before
    assert (last / "sae_weights.safetensors").read_bytes() == own


def test_bad_input_is_refused_and_writes_nothing(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(folder: Path, corpus: Path | None, *words: str) -> None:
        with pytest.raises(FraError) as caught:
            twin.build(folder, corpus)
        text = one_sentence(caught.value)
        assert all(word in text for word in words), text

    fresh, file = tmp_path / "fresh", tmp_path / "file"
    refused(fresh, tmp_path / "nowhere", "no folder", "CORPUS")
    file.write_text("a letter")
    refused(file, None, "is a file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").write_text("a letter")
    refused(tmp_path / "full", None, "something else")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["letter"]
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "D_SAE", recipe.D_SAE + 1)
        refused(built.parent, None, "other text or other sizes")
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "SEED", recipe.SEED + 1)
        refused(fresh, None, "another model", "sha256")
    books = tmp_path / "books"
    books.mkdir()
    with pytest.raises(SystemExit, match=r"no \.txt books"):
        twin.build(fresh, books)
    assert not fresh.exists()
    assert twin.main(["-o", str(file)]) == 2
    assert "is a file" in capsys.readouterr().err


def test_expectations_are_of_registered_claims() -> None:
    registered = tomllib.loads((ROOT / "claims/registered.toml").read_text())
    assert set(expected.IDENTITIES) | set(expected.LEARNT) <= set(registered)
    assert not set(expected.IDENTITIES) & set(expected.LEARNT)


def test_the_table_counts_by_claim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = make_ledger(evidence((GOOD,), head="L0H0"), evidence((BAD,), head="L0H1", power=0.9))
    (claim,) = {row.claim for row in ledger.verdicts}
    head, rule, row = expected.by_claim(ledger, {"said": lambda name: f"of {name}"})
    assert head.count("|") == rule.count("|") == row.count("|")
    cells = dict(zip(head.strip("| ").split(" | "), [cell.strip() for cell in row.split("|")[1:]], strict=False))
    assert (cells["claim"], cells["said"]) == (claim, f"of {claim}")
    assert (cells["SUPPORTED"], cells["REFUTED"], cells["INCONCLUSIVE"]) == ("1", "1", "")

    # one of two rows of a claim that is false there: scipy's own interval
    renamed = [row.model_copy(update={"claim": "Q05"}) for row in ledger.verdicts]
    *_, identities, wrong, which = expected.lines(ledger.model_copy(update={"verdicts": renamed}))
    assert identities.startswith("Identities: 0 of 0")
    assert "1 of 2 (0.013 to 0.987) SUPPORTED" in wrong
    assert which == "They are: Q05 L0H0."
    parts = [ledger.model_copy(update={"verdicts": [row]}) for row in ledger.verdicts]
    assert expected.joined(parts).verdicts == ledger.verdicts
    with pytest.raises(FraError, match="same claim and head"):
        expected.joined([ledger, *parts])
    missing = tmp_path / "ledger.json"
    assert expected.main([str(missing)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_scrambled_heads_keep_all_but_the_match_of_queries_and_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrambled, "DOCUMENTS", 4)
    with pytest.raises(FraError, match="holds something else"):
        scrambled.build(ROOT / "fixtures")
    built = fra.load_target(scrambled.build(tmp_path / "scrambled"))
    trained = fra.load_target("mini")
    assert built.known_tih == ()
    assert dict(built.seeds) == dict(trained.seeds)
    n, d_head = recipe.D_MODEL, recipe.D_MODEL // recipe.N_HEADS
    old, new = (
        GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (ROOT / "fixtures/mini/model", tmp_path / "scrambled/model")
    )
    for name, tensor in old.items():
        if "c_attn" not in name:
            assert torch.equal(tensor, new[name]), name
    tokens = torch.stack(sample(trained, 4))
    spreads = [
        [_row_spread(model, tokens, layer) for layer in range(recipe.N_LAYERS)]
        for model in (trained.model, built.model)
    ]
    alike = []
    # A matrix turned from the right keeps its Gram matrix; stretched, up to one factor.
    for layer in range(recipe.N_LAYERS):
        weight, bias = (f"transformer.h.{layer}.attn.c_attn.{kind}" for kind in ("weight", "bias"))
        before, after = (torch.cat([w[weight], w[bias][None]]).double() for w in (old, new))
        assert torch.equal(before[:, :n], after[:, :n]), "queries"
        assert torch.equal(before[:, 2 * n :], after[:, 2 * n :]), "values"
        for head in range(recipe.N_HEADS):
            own = slice(n + head * d_head, n + (head + 1) * d_head)
            gram, turned = before[:, own] @ before[:, own].T, after[:, own] @ after[:, own].T
            factor = turned.trace() / gram.trace()
            torch.testing.assert_close(turned, factor * gram, rtol=0, atol=1e-5 * float(turned.abs().max()))
            Q = before[:, head * d_head : (head + 1) * d_head]
            match, other = (Q @ K[:, own].T for K in (before, after))
            alike.append(float(torch.corrcoef(torch.stack([match.flatten(), other.flatten()]))[0, 1].abs()))
        torch.testing.assert_close(spreads[1][layer], spreads[0][layer], rtol=1e-3, atol=0)
    assert np.median(alike) < 0.3, "couplings of queries and keys are those of the trained head"


def _row_spread(model: object, tokens: torch.Tensor, layer: int) -> torch.Tensor:
    """Standard deviation of every head's own scores along their rows, from the model's hook."""
    hook = f"blocks.{layer}.attn.hook_attn_scores"
    _, cache = model.run_with_cache(tokens, names_filter=[hook])  # type: ignore[attr-defined]
    seen = torch.ones(tokens.shape[1], tokens.shape[1]).tril().bool()
    rows = [cache[hook][:, :, t, : t + 1] for t in range(tokens.shape[1])]
    total = sum((row - row.mean(-1, keepdim=True)).square().sum((0, 2)) for row in rows)
    return (total / (len(tokens) * seen.sum())).sqrt()  # type: ignore[union-attr,operator]
