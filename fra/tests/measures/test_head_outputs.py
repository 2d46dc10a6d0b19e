"""The claims about head outputs on whole targets: what is chosen, what is measured, D01's losses and D18's widths."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fra
from fra.attribution.head_outputs import observe, padded
from fra.attribution.raised_tokens import raised_tokens
from fra.claim import Outcome, judge
from fra.dictionaries.blockdiag import BlockDiagonalSAE, BlockDiagonalSAEConfig
from fra.induction.designs import TokenInduction
from fra.measures.head_outputs import corpus as head_output_corpus
from fra.measures.head_outputs import (
    d01_quality,
    d04_heads,
    d05_sources,
    d06_norms,
    d16_groups,
    d18_width,
)
from fra.measures.head_outputs.corpus import Documents, HeadOutputCorpus
from fra.measures.head_outputs.designs import (
    Alive,
    DictionaryQuality,
    Dominance,
    GroupLikeness,
    HeadOutputDocuments,
    OwnTokens,
    Widths,
)
from fra.statistics.stats import seed_of
from fra.stimuli import repeated
from fra.stimuli import sets as document_sets
from fra.stimuli.designs import RepeatedSets
from fra.stimuli.repeated import Batch
from fra.targets.given import GivenTarget
from fra.tests.claims import claim
from fra.tests.head_firings import D_HEAD, N_HEADS, Z, blocks_of, made_up
from fra.tests.models import D_MODEL, build_sae, model_folder, random_tokens, tiny_sae
from fra.tests.tiny_targets import signed_axes, write_target, write_text


def target(folder: Path, hook: Path | None, n_texts: int = 60) -> Any:
    rng = np.random.default_rng(5)
    words = ("one", "two", "three", "four", "five", "six", "seven", "said", "more", "than", "make", "and")
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = {f"{letters[k % 26]}-{k:02d}": " ".join(rng.choice(words, 60)) for k in range(n_texts)}
    place = folder / "text"
    dictionaries = {} if hook is None else {Z: hook}
    return fra.load_target(write_target(folder, model_folder("gpt2"), dictionaries, write_text(place, texts)))


@pytest.fixture
def short_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passages that fit the tiny models' context of 32."""

    def documents(made: Any, stimulus: str, design: Any) -> dict[str, Batch]:
        assert stimulus == "repeated_natural"
        rng = np.random.default_rng(3)
        sets = {}
        for name in document_sets.SETS:
            passages = [rng.choice(np.arange(1, 250), int(rng.integers(8, 15)), replace=False) for _ in range(40)]
            repeats = [repeated.repeat(p, 0, rng, f"s{k % 25}") for k, p in enumerate(passages)]
            sets[name] = repeated.collate(repeats)
        return sets

    monkeypatch.setattr(document_sets, "documents", documents)


FEW = {"design": (HeadOutputDocuments(discovery=30, measured=30), Alive(), Dominance(shuffles=10)), "min_sources": 8}


@pytest.mark.usefixtures("short_repeats")
def test_a_random_model_and_dictionary_support_nothing(tmp_path: Path) -> None:
    made = target(tmp_path, build_sae("topk", D_MODEL, Z, tmp_path / "sae", reshape_activations="hook_z"))
    found = d04_heads.dominance_evidence(claim("D04", **FEW), claim("D04.spread", **FEW), made)
    assert found["D04"].detail["draws of the control"].startswith("10, ") and found["D04"].n == 10
    found |= d06_norms.norm_evidence((claim("D06", **FEW), claim("D06.W_O", **FEW)), made)
    groups = {"design": (*FEW["design"], GroupLikeness(features=8, pairs=4)), "gates": {"features of the head": 4}}
    found |= d16_groups.group_evidence(claim("D16", **FEW | groups), made)
    found["D01"] = d01_quality.quality_evidence(
        claim("D01", min_sources=8, design=(FEW["design"][0], DictionaryQuality())), made
    )
    found |= {f"D05 {head}": row for head, row in d05_sources.source_evidence(claim("D05"), made).items()}
    outcomes = {name: judge(row.claim, row).outcome for name, row in found.items()}
    supported = [name for name, outcome in outcomes.items() if outcome == Outcome.SUPPORTED]
    assert not [name for name in supported if not name.startswith("L1H")], outcomes  # D16: what reads one head's output
    assert outcomes["L0H0"] == Outcome.CANNOT_RUN and outcomes["D05 L1H0"] == Outcome.NOT_APPLICABLE
    again = d04_heads.dominance_evidence(claim("D04", **FEW), claim("D04.spread", **FEW), made)
    assert again["D04"].candidates == found["D04"].candidates


@pytest.mark.usefixtures("short_repeats")
def test_what_attention_writes_is_asked_what_its_features_can_answer(tmp_path: Path) -> None:
    out = Z.replace("attn.hook_z", "hook_attn_out")
    made = target(tmp_path, None)
    made = GivenTarget(made.spec, made.model, {out: tiny_sae(out)}, made.documents())
    documents = head_output_corpus.corpus(made, FEW["design"][0])
    q = d01_quality.quality(made, out, documents, ("x",))
    tokens, body = documents.measured.tokens, documents.measured.real.clone()
    body[:, 0] = False
    x = made.model.run_with_cache(tokens, names_filter=[out])[1][out]
    acts = tiny_sae(out).encode(x).to_dense()
    assert q["live"].tolist() == ((acts != 0).sum(-1) * body).sum(1).tolist() and q["width"] == D_MODEL
    error = ((x - tiny_sae(out).decode(acts)).square().sum(-1) * body).sum(1)
    np.testing.assert_allclose(q["error"], error.detach().numpy(), rtol=1e-4)
    assert (q["losses"]["dictionary"] != q["losses"]["zero"]).all()
    own = claim("D01", min_sources=8, design=(FEW["design"][0], DictionaryQuality()))
    found = d01_quality.quality_evidence(own, made)
    dominance = d04_heads.dominance_evidence(claim("D04", **FEW), claim("D04.spread", **FEW), made)
    assert all(judge(row.claim, row).outcome != Outcome.CANNOT_RUN for row in (found, *dominance.values()))
    norms = d06_norms.norm_evidence((claim("D06", **FEW), claim("D06.W_O", **FEW)), made)
    assert {judge(row.claim, row).outcome for row in norms.values()} == {Outcome.CANNOT_RUN}
    measured = documents.measured.observe(made, out)
    half = measured.part([3, 1]).under(measured.outputs.encoder)
    mine = measured.part([3, 1])
    # Under its own encoder the control is what fires: b_O and the rows of the chosen documents are where they belong.
    assert torch.equal(half.live.feature.sort().values, mine.live.feature.sort().values)


def test_no_source_is_in_both_sets_and_each_document_is_of_its_source(tmp_path: Path) -> None:
    made = target(tmp_path, None)
    documents = head_output_corpus.corpus(made, HeadOutputDocuments(discovery=30, measured=15, longest=9))
    assert len(documents.discovery) == 30 and not set(documents.discovery.sources) & set(documents.measured.sources)
    assert len(documents.measured) == 15 and len(set(documents.measured.sources)) >= 10
    for part in (documents.discovery, documents.measured):
        for tokens, real, whole, source in zip(part.tokens, part.real, part.whole, part.sources, strict=True):
            texts = [[made.bos, *made.encode(t.text)][:9] for t in made.documents() if t.source == source]
            assert whole.tolist() in texts
            assert tokens[real].tolist() == whole.tolist()


def exchanged(made: Any) -> tuple[HeadOutputCorpus, HeadOutputCorpus]:
    """Two corpora with the same discovery documents and different measured ones, shorter in the second."""
    own = head_output_corpus.corpus(made, HeadOutputDocuments(discovery=30, measured=15, longest=20))
    others = [random_tokens(14, k) for k in range(12)]
    return own, HeadOutputCorpus(own.discovery, Documents.of(others, [f"other {k}" for k in range(12)]))


def test_what_is_chosen_knows_nothing_of_the_measured_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D01's mean and components, D04's living features and top heads, D16's pairs: to the last bit."""
    made = target(tmp_path, build_sae("topk", D_MODEL, Z, tmp_path / "sae", reshape_activations="hook_z"))
    seen: list[list[Any]] = []

    def spy(module: Any, name: str, keep: Any) -> None:
        own = getattr(module, name)

        def spied(*given: Any, **named: Any) -> Any:
            found = own(*given, **named)
            seen[-1].append(keep(given, found))
            return found

        monkeypatch.setattr(module, name, spied)

    spy(d01_quality, "principal", lambda given, found: (given[1], given[2]))
    division = ("alive", "share", "weight", "count")
    for module in (d04_heads, d16_groups):
        spy(module, "divide", lambda given, found: tuple(getattr(found, name) for name in division))
    spy(d16_groups, "group_of", lambda given, found: None if found is None else found.pairs)
    pairs = {"design": (*FEW["design"], GroupLikeness(features=8, pairs=4)), "gates": {"features of the head": 4}}
    for documents in exchanged(made):
        for module in (d04_heads, d16_groups):
            monkeypatch.setattr(module, "corpus", lambda *_, documents=documents: documents)
        seen.append([])
        d04_heads.dominance_evidence(claim("D04", **FEW), claim("D04.spread", **FEW), made)
        seen[-1] = seen[-1][:11]  # one of its own and ten under shuffles
        d16_groups.group_evidence(claim("D16", **FEW | pairs), made)
        d01_quality.quality(made, Z, documents, ("x",))
    assert len(seen[0]) == 11 + 1 + N_HEADS + 1 and sum(each is not None for each in seen[0]) > 13
    for a, b in zip(*seen, strict=True):
        assert _same(a, b)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return bool(np.array_equal(a, b))


@pytest.mark.usefixtures("short_repeats")
def test_induction_features_are_known_whatever_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = target(tmp_path, build_sae("topk", D_MODEL, Z, tmp_path / "sae", reshape_activations="hook_z"))
    monkeypatch.setattr(repeated, "MADE", repeated.Made(shortest_period=8))
    status = {name: SimpleNamespace(status="TIH" if name == "L1H0" else "not a TIH") for name in made.heads}
    monkeypatch.setattr(d05_sources, "head_status", lambda *_, **__: status)
    monkeypatch.setattr(d05_sources, "not_in_family", lambda _: "none")
    own, planted = d05_sources.known_features, d05_sources.Passages.planted
    seen: list[d05_sources.Known] = []
    documents: list[list[list[int]]] = []

    def spied(*given: Any) -> Any:
        seen.append(own(*given))
        return seen[-1]

    monkeypatch.setattr(d05_sources, "known_features", spied)
    lax = OwnTokens(share=0.0, firings=1, strong=0.1, others_at_most=1.0)
    few = claim("D05", gates={"induction features": 1}, design=(RepeatedSets(), TokenInduction(), lax))
    for exchange in ("", "others"):

        def made_of(passages: Any, tokens: Any, repeats: int, seeds: Any, exchange: str = exchange) -> Any:
            also = (exchange,) if exchange and seeds[-1] == "measured" else ()
            found = planted(passages, tokens, repeats, (*seeds, *also))
            documents.append([p.document.tokens.tolist() for p in found])
            return found

        monkeypatch.setattr(d05_sources.Passages, "planted", made_of)
        row = d05_sources.source_evidence(few, made)["L1H0"]
        assert row.candidates and row.n >= 20, row
    learnt, measured, again, exchanged_for = documents
    assert learnt == again and measured != exchanged_for and learnt[0] != measured[0]
    for name in ("features", "tokens", "median", "edges"):
        assert _same(getattr(seen[0], name), getattr(seen[1], name))


def test_a_dictionary_that_is_right_by_construction_is_good_enough(tmp_path: Path) -> None:
    axes = signed_axes(tmp_path / "sae", Z, k=28, reshape_activations="hook_z")
    made = target(tmp_path, axes)
    bars = {
        "loss recovered (mean)": 0.9,
        "over PCA of equal L0": -0.1,
        "over an untrained dictionary": 0.1,
        "L0 over width": 0.95,
    }
    own = claim("D01", bars=bars, design=(FEW["design"][0], DictionaryQuality()), min_sources=8)
    found = d01_quality.quality_evidence(own, made)
    conditions = {c.name: c for c in found.candidates["every dictionary"]}
    assert conditions["loss recovered (zero)"].effect > 0.95, found.detail
    numbers = found.detail["numbers"][Z]
    recovered = numbers["loss recovered by arm"]  # of a random model's loss, which may fall by any disturbance
    assert abs(recovered["dictionary"] - 1) < abs(recovered["untrained"] - 1)
    assert numbers["L0"] <= 28 and conditions["L0 over width"].finite and numbers["explained variance"][0] > 0.9
    low, own_share, high = numbers["never fires"][1], numbers["never fires"][0], numbers["never fires"][2]
    assert 0 <= low <= own_share <= high <= 1


@pytest.mark.usefixtures("short_repeats")
def test_only_what_the_first_copy_foretells_counts_on_repeated_text(tmp_path: Path) -> None:
    made = target(tmp_path, build_sae("topk", D_MODEL, Z, tmp_path / "sae", reshape_activations="hook_z"))
    corpus = head_output_corpus.repeated_corpus(made, RepeatedSets())
    assert len(corpus.discovery) == len(corpus.measured) == 40 == len(corpus.measured.sources)
    for part in (corpus.discovery, corpus.measured):
        for tokens, real, document in zip(part.tokens, part.real, part.whole, strict=True):
            period = (len(document) - 1) // 2
            assert torch.equal(tokens[: len(document)], document)
            counted = torch.nonzero(real)[:, 0]
            assert counted.tolist() == list(range(period + 2, 2 * period + 1))
            assert all(int(tokens[t - 1]) == int(tokens[t - 1 - period]) for t in counted.tolist())
    q = d01_quality.quality(made, Z, corpus, ("x",))
    seen = observe(made.model, made.dictionaries[Z], corpus.measured.whole)
    inside = observe(made.model, made.dictionaries[Z], corpus.discovery.whole).z[corpus.discovery.real].flatten(1)
    for doc, real in enumerate(corpus.measured.real):
        assert q["positions"][doc] == int(real.sum())
        live = seen.live.where((seen.live.doc == doc) & real[seen.live.pos])
        assert q["live"][doc] == len(live)
        apart = seen.z[doc].flatten(1)[real] - inside.mean(0)
        assert q["spread"][doc] == pytest.approx(float(apart.square().sum()), rel=1e-4)
    found = d01_quality.quality_evidence(claim("D01.repeated"), made)
    assert found.n == 25 and len(found.candidates["every dictionary"]) == 5


def test_every_source_has_an_untrained_dictionary_of_its_own() -> None:
    sae = tiny_sae(Z)
    z = torch.randn(1, 6, N_HEADS, D_HEAD).expand(4, -1, -1, -1)
    rows, live = d01_quality.by_untrained(sae, z, ("b", "a", "b", "c"), ("x",))
    for k, source in enumerate("babc"):
        expected, count = d01_quality.reconstruct(d01_quality.untrained(sae, seed_of("x", source)), z[k])
        assert torch.equal(rows[k], expected) and torch.equal(live[k], count)
    assert torch.equal(rows[0], rows[2])
    assert not torch.allclose(rows[0], rows[1]) and not torch.allclose(rows[0], rows[3])


def test_losses_are_the_models_own(tmp_path: Path) -> None:
    made = target(tmp_path, None)
    documents, _ = padded([random_tokens(9, 1), random_tokens(13, 2)])
    real = padded([random_tokens(9, 1), random_tokens(13, 2)])[1]
    own = d01_quality.losses(made, documents, real, Z, None)
    with torch.no_grad():
        for number, tokens in enumerate((random_tokens(9, 1), random_tokens(13, 2))):
            log_p = made.model(tokens[None])[0].log_softmax(-1)
            expected = -sum(float(log_p[t, tokens[t + 1]]) for t in range(len(tokens) - 1))
            assert own[number] == pytest.approx(expected, rel=1e-5)
    gone = d01_quality.losses(made, documents, real, Z, torch.zeros(2, 13, D_MODEL))
    assert not np.allclose(gone, own)


def test_principal_components_and_the_untrained_dictionary() -> None:
    g = torch.Generator().manual_seed(0)
    low = torch.randn(200, 3, generator=g) @ torch.randn(3, 12, generator=g) + 5
    assert torch.allclose(d01_quality.principal(low, low, 3), low, atol=1e-3)
    assert not torch.allclose(d01_quality.principal(low, low, 2), low, atol=1e-1)
    sae = tiny_sae(Z, dtype="float64", reshape_activations="hook_z")
    other = d01_quality.untrained(sae, 7)
    assert torch.equal(other.b_dec, sae.b_dec) and not bool(other.b_enc.any())
    cosine = torch.nn.functional.cosine_similarity(other.W_dec.detach().flatten(), sae.W_dec.detach().flatten(), dim=0)
    assert abs(float(cosine)) < 0.1
    unit = [torch.nn.functional.normalize(x.detach().flatten(), dim=0) for x in (other.W_enc.T, other.W_dec)]
    torch.testing.assert_close(*unit)
    assert float(other.W_dec.detach().square().mean()) == pytest.approx(float(sae.W_dec.detach().square().mean()))


def test_the_untrained_dictionary_of_blocks_is_tied_block_by_block() -> None:
    config = BlockDiagonalSAEConfig(d_in=D_MODEL, d_sae=2 * D_MODEL, n_heads=4, k=2)
    sae = BlockDiagonalSAE(config)
    other = d01_quality.untrained(sae, 7)
    encoder, decoder = (part.detach() for part in (other.W_enc_blocks, other.W_dec_blocks))
    assert encoder.shape == decoder.mT.shape
    unit = [torch.nn.functional.normalize(part.flatten(), dim=0) for part in (encoder.mT, decoder)]
    torch.testing.assert_close(*unit)
    assert abs(float(torch.nn.functional.normalize(sae.W_dec_blocks.detach().flatten(), dim=0) @ unit[1])) < 0.1


WIDTHS = {"min_sources": 5}


@pytest.mark.usefixtures("short_repeats")
def test_two_widths_are_compared_and_one_cannot_be(tmp_path: Path) -> None:
    narrow = build_sae("topk", D_MODEL, Z, tmp_path / "narrow", d_sae=48, reshape_activations="hook_z")
    made = target(tmp_path, narrow)
    own = claim("D18", **WIDTHS)
    one = judge(own, d18_width.width_evidence(own, made))
    assert one.outcome == Outcome.CANNOT_RUN and "one width only" in one.reason
    wide = tiny_sae(Z, d_sae=192, reshape_activations="hook_z")
    made.dictionaries = {Z: made.dictionaries[Z], f"wide {Z}": wide}
    assert d18_width.widths(made) == {1: {48: [made.dictionaries[Z]], 192: [wide]}}
    found = d18_width.width_evidence(own, made)
    alone = judge(own, found)
    assert alone.outcome == Outcome.INCONCLUSIVE and "one dictionary a width, where 3 are needed" in alone.reason
    numbers = found.detail["by dictionary"]
    assert numbers["layer 1, 192 features"]["L0"][0] == pytest.approx(6, abs=0.01)


@pytest.mark.usefixtures("short_repeats")
def test_widths_are_those_of_the_studys_arm_and_every_run_counts(tmp_path: Path) -> None:
    first = build_sae("topk", D_MODEL, Z, tmp_path / "own", d_sae=96, reshape_activations="hook_z")
    target(tmp_path, first)
    place = tmp_path / "tiny.toml"
    runs = [("dense-width", d_sae, run) for d_sae in (48, 192) for run in range(3)]
    arms = (*runs, ("dense-width", 64, 0), ("dense", 32, 0))
    for arm, d_sae, run in arms:
        torch.manual_seed(run)
        build_sae("topk", D_MODEL, Z, tmp_path / f"{arm}{d_sae}.{run}", d_sae=d_sae, reshape_activations="hook_z")
    entries = [f'[[study]]\narm = "{arm}"\nhook = "{Z}"\npath = "{arm}{d_sae}.{run}"\n' for arm, d_sae, run in arms]
    place.write_text(place.read_text() + "".join(entries))
    made = fra.load_target(place)
    assert {d_sae: len(of) for d_sae, of in d18_width.widths(made)[1].items()} == {48: 3, 192: 3, 64: 1}
    assert all(int(sae.cfg.d_sae) == width for width, of in d18_width.widths(made)[1].items() for sae in of)
    own = claim("D18", **WIDTHS)
    found = d18_width.width_evidence(own, made)
    assert judge(own, found).outcome in (Outcome.REFUTED, Outcome.INCONCLUSIVE)
    assert found.undecided is None
    numbers = found.detail["by dictionary"]
    narrow, wide = (numbers[f"layer 1, {d_sae} features"] for d_sae in (48, 192))
    names = ("tokens a document", "tokens a document, dealt anew")
    gains = np.subtract.outer(wide[names[0]], narrow[names[0]])
    assert found.candidates["every dictionary"][0].effect == pytest.approx(gains.min())  # the worst pair of runs
    less = gains - np.subtract.outer(wide[names[1]], narrow[names[1]])
    assert found.candidates["every dictionary"][1].effect == pytest.approx(less.min())


def test_a_dictionary_that_never_fires_is_said_to() -> None:
    some = made_up(blocks_of([0, 1, 2, 3]))
    silent = dataclasses.replace(some, live=some.live.where(some.live.pos < 0))
    assert len(silent.under(head_output_corpus.shuffled(some.outputs.encoder, 0)).live) == 0


@pytest.mark.usefixtures("short_repeats")
def test_tokens_found_are_counted_by_document(tmp_path: Path) -> None:
    made = target(tmp_path, build_sae("topk", D_MODEL, Z, tmp_path / "sae", reshape_activations="hook_z"))
    batch = document_sets.documents(made, "repeated_natural", RepeatedSets())["confirmation"]
    sae = made.dictionaries[Z]
    count, dealt, _ = d18_width.tokens_found(made, sae, batch, Widths(deals=3), ("x",))
    o = observe(made.model, sae, batch.documents())
    own = raised_tokens(made.model, sae)

    def by_hand(own: list[int]) -> list[int]:
        found = []
        for doc in range(len(batch)):
            period, hits = int(batch.periods[doc]), set()
            here = o.live.where(o.live.doc == doc)
            for pos, feature in zip(here.pos.tolist(), here.feature.tolist(), strict=True):
                if pos > period and int(batch.tokens[doc, pos - period + 1]) == own[feature]:
                    hits.add(own[feature])
            found.append(len(hits))
        return found

    assert count.tolist() == by_hand(own.tolist())
    expected = np.zeros(len(batch))
    for source in set(batch.sources):  # deals of its own
        generator = torch.Generator().manual_seed(seed_of("x", source))
        deals = [own[torch.randperm(len(own), generator=generator)].tolist() for _ in range(3)]
        mine = np.array([name == source for name in batch.sources])
        expected[mine] = np.mean([by_hand(deal) for deal in deals], axis=0)[mine]
    assert dealt == pytest.approx(expected)
