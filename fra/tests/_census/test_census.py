"""`fra.census` on whole models: against `fra.resolve` document by document, and the life of a census."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import fra
from fra._census import census as whole_census
from fra._census import observe as census_observe
from fra._census.census import census
from fra._census.result import Census
from fra.errors import FraError
from fra.tests.bench import workloads
from fra.tests.models import D_SAE, D_VOCAB, N_CTX, NORMS_IN_FLOAT32, random_tokens, tiny, tiny_sae

DOCUMENTS = [random_tokens(n, seed) for seed, n in enumerate((11, 5, 16, 11, 1, 8))]
STRIPES = [3, [0, 2], 5, [], 0, 7]
LAYER = 1
HOOK = f"blocks.{LAYER}.hook_resid_pre"
ALL: Any = ("sum", "abs", "max", "mean", "count")


def take(kind: str = "gpt2", documents: Any = None, **options: Any) -> Census:
    documents = DOCUMENTS if documents is None else documents
    return census(tiny(kind, torch.float64), sae(), documents, LAYER, **options)


def sae() -> Any:
    return tiny_sae(HOOK, dtype="float64")


def resolved(kind: str, reduce: str, head: int) -> pd.DataFrame:
    """The same from every document's own resolution."""
    every = []
    for tokens in DOCUMENTS:
        found = fra.resolve(tiny(kind, torch.float64), sae(), tokens, LAYER, head)
        every.append(found.channels("sum" if reduce == "mean" else reduce))
    whole = pd.concat(every).groupby(["q_feature", "k_feature"], as_index=False)
    table = whole.agg({"value": "max" if reduce == "max" else "sum", "count": "sum"})
    if reduce == "mean":
        table["value"] /= table["count"]
    return table


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "gemma3", "qwen3", "pythia", "gpt_neo", "no_layernorm"])
def test_a_census_is_the_sum_of_the_documents_resolved(kind: str) -> None:
    found = take(kind, reduce=ALL, heads=[1, 3]).strongest(ALL, None)
    for reduce in ALL:
        for head in (1, 3):
            mine = found[reduce][found[reduce]["head"] == head].drop(columns="head")
            mine = mine.sort_values(["q_feature", "k_feature"]).reset_index(drop=True)
            expected = resolved(kind, reduce, head)
            # The scale of the norm depends in its last bits on how many documents are run together.
            exact = kind not in NORMS_IN_FLOAT32
            tolerance = {"rtol": 1e-9, "atol": 1e-11} if exact else {"rtol": 1e-4, "atol": 1e-4}
            pd.testing.assert_frame_equal(mine, expected, check_dtype=False, **tolerance)


def test_patterns_are_those_of_the_model() -> None:
    for kind in ("gpt2", "gemma2", "qwen3", "pythia"):
        model = tiny(kind, torch.float64)
        found = take(kind, reduce="mass")
        name = f"blocks.{LAYER}.attn.hook_pattern"
        for doc, number in enumerate(found.corpus.number.tolist()):
            own = model.run_with_cache(DOCUMENTS[number][None], names_filter=[name])[1][name][0]
            for head in range(4):
                torch.testing.assert_close(
                    found.layer.patterns(found.corpus, doc, head), own[head], rtol=1e-6, atol=1e-8
                )


def test_the_sensitivity_is_the_derivative_of_attention_in_the_gain_of_a_channel() -> None:
    found = take(reduce="sensitivity", stripes=STRIPES).channels(n=4, heads=[2])
    for _, i, j, value, _ in found.itertuples(index=False):
        change = 0.0
        for tokens, offsets in zip(DOCUMENTS, STRIPES, strict=True):
            head = fra.resolve(tiny("gpt2", torch.float64), sae(), tokens, LAYER, 2)
            scores, F = head.scores(), head.channel(int(i), int(j))
            step = 1e-5
            moved = [(scores + sign * step * F).softmax(-1) for sign in (1, -1)]
            for offset in [offsets] if isinstance(offsets, int) else offsets:
                change += float(((moved[0] - moved[1]) / (2 * step)).diagonal(-offset).sum())
        assert value == pytest.approx(change, rel=1e-6, abs=1e-9)


def test_padding_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    together = take("pythia", reduce=ALL, stripes=STRIPES)
    monkeypatch.setattr(census_observe, "TOKENS_AT_ONCE", 1)
    alone = take("pythia", reduce=ALL, stripes=STRIPES)
    assert together.n_positions == alone.n_positions == sum(map(len, DOCUMENTS))
    for where in ("all", "stripe", "off"):
        for reduce in ALL:
            pd.testing.assert_frame_equal(
                together.channels(reduce, where=where).sort_values(
                    ["head", "q_feature", "k_feature"], ignore_index=True
                ),
                alone.channels(reduce, where=where).sort_values(["head", "q_feature", "k_feature"], ignore_index=True),
                rtol=1e-9,
            )


def test_stripe_and_off_stripe_make_the_whole() -> None:
    found = take(reduce="sum", stripes=STRIPES)
    key = ["head", "q_feature", "k_feature"]
    whole, on, off = (found.channels(where=where).set_index(key) for where in ("all", "stripe", "off"))
    assert 0 < len(on) < len(whole)
    total = on.add(off, fill_value=0).reindex(whole.index)
    torch.testing.assert_close(torch.tensor(total["value"].to_numpy()), torch.tensor(whole["value"].to_numpy()))
    assert (total["count"] == whole["count"]).all()


def test_saved_and_loaded_it_answers_the_same(tmp_path: Path) -> None:
    found = take("qwen3", reduce=("sum", "sensitivity"), stripes=STRIPES)
    found.save(tmp_path / "a" / "census.safetensors")
    again = Census.load(tmp_path / "a" / "census.safetensors", tiny("qwen3", torch.float64), sae(), LAYER)
    assert (again.heads, again.reduces, again.nbytes) == (found.heads, found.reduces, found.nbytes)
    for reduce in found.reduces:
        pd.testing.assert_frame_equal(again.channels(reduce), found.channels(reduce), check_exact=True)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["census.safetensors"]


def test_two_halves_merged_are_the_whole() -> None:
    whole = take("pythia", reduce=ALL)
    merged = take("pythia", DOCUMENTS[:2], reduce=ALL).merge(take("pythia", DOCUMENTS[2:], reduce=ALL))
    assert merged.n_documents == len(DOCUMENTS)
    assert merged.n_entries == whole.n_entries
    for reduce in ALL:
        a, b = (one.channels(reduce).sort_values(["head", "q_feature", "k_feature"]) for one in (whole, merged))
        pd.testing.assert_frame_equal(a.reset_index(drop=True), b.reset_index(drop=True), rtol=1e-9, atol=1e-12)
    strongest = whole.channels("max", n=1, heads=[0])
    where = strongest.iloc[0][["q_feature", "k_feature"]].astype(int).tolist()
    pd.testing.assert_frame_equal(merged.examples(0, *where), whole.examples(0, *where), rtol=1e-9)


# Tables of angles are in float32 in transformers, so that R_t u . R_s v is R_{t-s} u . v to that precision alone.
@pytest.mark.parametrize(("kind", "tolerance"), [("gpt_neo", 1e-9), ("pythia", 1e-6)])
def test_examples_of_merged_halves_are_the_strongest_terms_of_the_models_own_resolutions(
    kind: str, tolerance: float
) -> None:
    merged = take(kind, DOCUMENTS[:3]).merge(take(kind, DOCUMENTS[3:]))
    _, i, j, _, _ = (int(cell) for cell in merged.channels("count", n=1, heads=[2]).iloc[0])
    terms = {}
    for number, tokens in enumerate(DOCUMENTS):
        F = fra.resolve(tiny(kind, torch.float64), sae(), tokens, LAYER, 2).channel(i, j).tril()
        terms |= {(number, int(t), int(s)): float(F[t, s]) for t, s in F.nonzero().tolist()}
    strongest = sorted(terms, key=lambda at: -abs(terms[at]))[:5]
    found = merged.examples(2, i, j, 5)
    assert [(int(d), int(t), int(s)) for d, t, s in found.iloc[:, :3].to_numpy()] == strongest
    assert found["value"].tolist() == pytest.approx([terms[at] for at in strongest], rel=tolerance)


def interrupt_once(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lets the fourth batch of documents be interrupted; what is returned grows by every batch that is observed."""
    observe, calls = census_observe.Observer.observe, []

    def falls_over(self: Any, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return observe(self, *args)

    monkeypatch.setattr(census_observe.Observer, "observe", falls_over)
    return calls


def test_an_interrupted_census_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census_observe, "TOKENS_AT_ONCE", 12)
    never = take("llama", reduce=ALL, stripes=STRIPES)
    calls = interrupt_once(monkeypatch)
    options: Any = {"reduce": ALL, "stripes": STRIPES, "checkpoint": tmp_path, "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        take("llama", **options)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    before = len(calls)
    resumed = take("llama", **options)
    assert len(calls) - before < 5, "what was saved is not observed again"
    for name, tensor in never.corpus.tensors().items():
        assert torch.equal(tensor, resumed.corpus.tensors()[name]), name
    for reduce in ALL:
        pd.testing.assert_frame_equal(resumed.channels(reduce), never.channels(reduce), check_exact=True)
    _, i, j, _, _ = (int(cell) for cell in never.channels("max", n=1, heads=[1]).iloc[0])
    pd.testing.assert_frame_equal(resumed.examples(1, i, j), never.examples(1, i, j), check_exact=True)
    n_calls = len(calls)
    take("llama", **options)
    assert len(calls) == n_calls, "a finished census is only read"
    with pytest.raises(FraError, match="is of other documents, weights or reductions"):
        take("llama", DOCUMENTS[:3], checkpoint=tmp_path)


def test_a_checkpoint_is_json_and_safetensors(tmp_path: Path) -> None:
    take(checkpoint=tmp_path)
    (file,) = tmp_path.glob("[!.]*")
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"]["format"] == "fra-census/1"
    assert set(json.loads(header["__metadata__"]["about"])) == {"fingerprint", "documents"}


def test_memory_is_that_of_the_entries() -> None:
    found = census(tiny("gpt2"), tiny_sae(HOOK), DOCUMENTS, LAYER)
    assert found.nbytes == 8 * found.n_entries + 4 * found.n_positions + 3 * 8 * found.n_documents


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize("where", ["all", "stripe"])
def test_peak_memory_is_as_documented(where: Any) -> None:
    """With a dictionary so wide that one table of [d_sae, d_sae] would take 1 GB."""
    d_sae, n_pos, n_heads = 16_384, 256, 4
    corpus, layer = workloads.entries(2, n_pos, 32, d_sae, 64), workloads.layer(d_sae, n_heads, d_model=64)
    workloads.of(layer, workloads.entries(1, 16, 4, d_sae, 4)).strongest(("sum", "count"), 50, where=where)

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    def peak() -> int:
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        workloads.of(layer, corpus).strongest(("sum", "count"), 50, where=where)
        return status("VmHWM") - before

    n, live = len(corpus.feature), len(corpus.live)
    w = min(1024, max(128, (1 << 24) // (4 * live)))
    said = 24 * n + 8 * n_heads * 64 * live + 40 * n_heads * live * 2 + 4 * live * w * 2 + (40 << 20)
    assert said < 4 * d_sae**2 / 8
    # the allocator gives pages back when it likes: the least of a few runs is the scan
    assert min(peak() for _ in range(4)) <= said


def test_what_does_not_fit_is_refused_before_it_is_allocated() -> None:
    found = take(memory_budget=20_000)
    with pytest.raises(FraError, match=r"more than memory_budget|memory_budget is 20,000: pass n="):
        found.channels()
    assert len(found.channels(n=3)) == 12
    with pytest.raises(FraError, match="holds not even one key feature's column"):
        take(memory_budget=10).channels(n=1)


def test_an_error_of_the_reading_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaking the scale of the norm breaks the agreement with `resolve`."""
    right = census_observe.live_entries
    monkeypatch.setattr(census_observe, "live_entries", lambda *args: (*right(*args)[:2], 1.01 * right(*args)[2]))
    mine = take(heads=[1]).channels().drop(columns="head").sort_values(["q_feature", "k_feature"], ignore_index=True)
    expected = resolved("gpt2", "sum", 1)
    assert (mine["count"] == expected["count"]).all()
    assert not torch.allclose(torch.tensor(mine["value"].to_numpy()), torch.tensor(expected["value"].to_numpy()))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"documents": []}, "there are no documents"),
    ({"documents": [DOCUMENTS[0][None]]}, r"document 0: tokens must be the integer ids of one document"),
    ({"documents": [DOCUMENTS[0], DOCUMENTS[0].float()]}, r"document 1: tokens must be .* not torch.float32"),
    ({"documents": [DOCUMENTS[0][:0]]}, "document 0 is empty"),
    ({"documents": [torch.zeros(N_CTX + 1, dtype=torch.long)]}, f"document 0 has {N_CTX + 1} tokens and .* {N_CTX}"),
    ({"documents": [torch.tensor([0, D_VOCAB])]}, f"token id {D_VOCAB} of document 0 is outside the vocabulary"),
    ({"documents": [torch.tensor([-1, 0])]}, "token id -1 of document 0"),
    ({"heads": [4]}, "head 4 is out of range"),
    ({"heads": []}, "must name at least one head"),
    ({"heads": [1, 1]}, "none twice"),
    ({"reduce": ()}, "reduce names nothing"),
    ({"reduce": "contrast"}, "'contrast' needs stripes"),
    ({"stripes": [1]}, "there are 1 stripes for 6 documents"),
    ({"stripes": [1, 5, 1, 1, 0, 1]}, "stripe 5 of document 1 is no offset"),
    ({"stripes": [1, -1, 1, 1, 0, 1]}, "stripe -1 of document 1"),
    ({"memory_budget": 0}, "must be positive"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_gets_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FraError, match=message):
        take(**options)


def test_a_layer_that_is_not_the_dictionarys_is_refused() -> None:
    with pytest.raises(FraError, match="layer 7 is out of range"):
        census(tiny("gpt2"), tiny_sae(HOOK), DOCUMENTS, 7)
    with pytest.raises(FraError, match="is the attention input of layer 1, not of layer 0"):
        census(tiny("gpt2"), tiny_sae(HOOK), DOCUMENTS, 0)


def test_bad_questions_get_one_sentence(tmp_path: Path) -> None:
    found = take(heads=[0, 2])
    questions: list[tuple[Any, str]] = [
        # Where types are not checked, as they are in this suite.
        (lambda: whole_census.check_reduces(["total"], True), "reduce='total' is unknown: choose of sum, abs"),
        (lambda: found.check(["total"], None, [0], "all"), "reduce='total' is unknown"),
        (lambda: found.check(["sum"], None, [0], "beside"), "where='beside' is unknown"),
        (lambda: found.channels("mass"), "was not asked for"),
        (lambda: found.channels("contrast"), "needs stripes"),
        (lambda: found.channels(where="stripe"), "needs stripes"),
        (lambda: found.channels(n=0), "n=0 asks for nothing"),
        (lambda: found.channels(heads=[1]), r"no head \[1\]: it has \[0, 2\]"),
        (lambda: found.examples(0, D_SAE, 0), f"feature {D_SAE} is out of range"),
        (lambda: found.merge(take(heads=[0])), "only censuses of the same model"),
        (lambda: take(stripes=STRIPES, reduce="contrast").channels(where="off"), "has no meaning for 'contrast'"),
        (lambda: Census.load(tmp_path / "none", tiny("gpt2"), sae(), LAYER), "cannot be read"),
    ]
    for ask, message in questions:
        with pytest.raises(FraError, match=message):
            ask()


def test_a_census_of_other_weights_is_not_loaded(tmp_path: Path) -> None:
    take("llama").save(tmp_path / "census")
    with pytest.raises(FraError, match="is of another model, dictionary or layer"):
        Census.load(tmp_path / "census", tiny("qwen3", torch.float64), sae(), LAYER)
    (tmp_path / "census").write_bytes(b"nothing")
    with pytest.raises(FraError, match="cannot be read"):
        Census.load(tmp_path / "census", tiny("llama", torch.float64), sae(), LAYER)


def test_angles_that_depend_on_the_length_are_never_mixed() -> None:
    """longrope turns texts of more than 16 tokens otherwise: a census is of texts on one side, and exact there."""
    texts = {"short": [random_tokens(12), random_tokens(9, 2)], "long": [random_tokens(30, 1), random_tokens(17, 3)]}
    key = ["q_feature", "k_feature"]
    for some in texts.values():
        mine = take("longrope", some).channels(heads=[0]).set_index(key)["value"]
        model = tiny("longrope", torch.float64)
        alone = [fra.resolve(model, sae(), tokens, LAYER, 0).channels().set_index(key)["value"] for tokens in some]
        expected = alone[0].add(alone[1], fill_value=0.0)
        assert mine.sub(expected, fill_value=0.0).abs().max() < 1e-4 * expected.abs().max()  # norms are float32
    with pytest.raises(FraError, match=r"rotates positions by other angles in a longer text"):
        take("longrope", [*texts["short"], *texts["long"]])
    with pytest.raises(FraError, match="rotate by other angles"):
        take("longrope", texts["short"]).merge(take("longrope", texts["long"]))


def test_angles_are_compared_in_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where angles depend on what was run before (dynamic scaling), shortest and longest may agree and others not."""
    monkeypatch.setattr(census_observe, "TOKENS_AT_ONCE", 1)
    monkeypatch.setattr(census_observe.Observer, "check_rotation", lambda self, shortest: None)
    with pytest.raises(FraError, match=r"rotates positions by other angles in a longer text"):
        take("longrope", [random_tokens(12), random_tokens(30, 1)])


def test_it_is_public() -> None:
    assert fra.census is whole_census.census


def test_a_census_takes_no_devices_place_and_follows_links(tmp_path: Path) -> None:
    """A pipe stays a pipe, a link a link, and what only its owner might read stays so."""
    made = take(documents=[random_tokens(12)])
    pipe, link, real = tmp_path / "pipe", tmp_path / "link", tmp_path / "real"
    os.mkfifo(pipe)
    with pytest.raises(FraError, match="is no regular file: name one"):
        made.save(pipe)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    real.write_text("old")
    real.chmod(0o600)
    link.symlink_to(real)
    made.save(link)
    assert link.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "real"]
