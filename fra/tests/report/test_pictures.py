"""Examples that a row of the ledger shows: the right place on the right document, by hand and by the model's own hooks,
in a form that says the same numbers in less space, with links where the dictionary has an id.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fra
from fra.attribution.examples import FEATURE, feature_example
from fra.attribution.head_outputs import observe
from fra.core.coded import measure_arm
from fra.dictionaries.texts import text_of
from fra.measures.families.rows import shown
from fra.measures.pairs import layers, q12_causal_ranking
from fra.measures.pairs.designs import SingleTerms
from fra.plot import drawings
from fra.report import pictures
from fra.report.pictures import packed
from fra.search import examples
from fra.search.channels import measure_arms
from fra.search.examples import example_on_text, first_example
from fra.stimuli import repeated
from fra.stimuli.padding import Texts
from fra.tests import circuit, families
from fra.tests.models import random_tokens, tiny, tiny_sae
from fra.verdicts.ledger import clean

HOOK, Z = "blocks.1.ln1.hook_normalized", "blocks.1.attn.hook_z"
ID = "tiny/1-att"
PAGES = f"https://www.neuronpedia.org/{ID}"
LENGTHS = (20, 13, 17)
TOKENS = torch.stack([random_tokens(20, seed) for seed in range(3)])
HEAD = 2


def by_hand(model: Any, sae: Any, pair: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """F_ij and the pattern of one head of folded weights, in float64, from the model's own hooks."""
    names = [HOOK, "blocks.1.attn.hook_pattern"]
    with torch.no_grad():
        cache = model.run_with_cache(TOKENS, names_filter=names)[1]
        acts = sae.encode(cache[HOOK].to(sae.W_dec)).double()
        q, k = (acts[..., f, None] * sae.W_dec[f].double() for f in pair)
        attention = model.blocks[1].attn
        F = (q @ attention.W_Q[HEAD].double()) @ (k @ attention.W_K[HEAD].double()).mT / 8**0.5
    return np.tril(F.detach().numpy()), cache[names[1]][:, HEAD].detach().numpy()


def test_natural_text_is_shown_where_the_channel_does_most(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sae = tiny("gpt2", torch.float64, True), tiny_sae(HOOK, dtype="float64")
    arm = measure_arm(model, sae, TOKENS, 1, HOOK)
    often = torch.bincount(arm.codes.feature).topk(2).indices.tolist()
    pair = (often[0], often[1])
    F, pattern = by_hand(model, sae, pair)
    for doc, n in enumerate(LENGTHS):
        F[doc, n:] = 0
    for longest in (48, 9):
        monkeypatch.setattr(examples, "LONGEST", longest)
        doc, query, _ = np.unravel_index(np.abs(F[:, :longest]).argmax(), F[:, :longest].shape)
        found = example_on_text(arm, HEAD, pair, TOKENS, LENGTHS)
        assert found is not None
        n = min(LENGTHS[doc], query + 3)
        assert found.example.tokens.tolist() == TOKENS[doc, :n].tolist()
        assert np.abs(found.example.contribution - F[doc, :n, :n]).max() < 1e-6
        assert np.abs(found.example.pattern - pattern[doc, :n, :n]).max() < 1e-6
    monkeypatch.setattr(examples, "LONGEST", 1)  # nothing lies so early: the earliest that there is
    first = int(np.flatnonzero(np.abs(F).max((0, 2)) > 0)[0])
    only = example_on_text(arm, HEAD, pair, TOKENS, LENGTHS)
    assert only is not None
    assert len(only.example.tokens) <= max(first, 1) + 3
    nowhere = torch.zeros(3, 20, 20, dtype=torch.bool)
    assert example_on_text(arm, HEAD, pair, TOKENS, LENGTHS, nowhere) is None
    monkeypatch.undo()
    chosen = nowhere.clone()
    chosen[1, 5, :] = True
    at_five = example_on_text(arm, HEAD, pair, TOKENS, LENGTHS, chosen)
    assert at_five is None or at_five.example.tokens.tolist() == TOKENS[1, :8].tolist()
    held = [t for doc, n in enumerate(LENGTHS) for t in TOKENS[doc, :n][_live(model, sae, doc, pair[0])[:n]].tolist()]
    assert dict(found.query) == {t: held.count(t) for t, _ in found.query}
    assert found.query[0][1] == max(held.count(t) for t in held)


def _live(model: Any, sae: Any, doc: int, feature: int) -> torch.Tensor:
    with torch.no_grad():
        x = model.run_with_cache(TOKENS[doc : doc + 1], names_filter=[HOOK])[1][HOOK]
        return torch.as_tensor(sae.encode(x.to(sae.W_dec))[0, :, feature] != 0)


def test_rotation_and_windows_are_those_of_the_resolution() -> None:
    for kind in ("pythia", "gemma2"):
        model, sae = tiny(kind), tiny_sae(HOOK)
        arm = measure_arm(model, sae, TOKENS, 1, HOOK)
        often = torch.bincount(arm.codes.feature).topk(2).indices.tolist()
        found = example_on_text(arm, HEAD, (often[0], often[1]), TOKENS, LENGTHS)
        assert found is not None
        tokens = torch.from_numpy(found.example.tokens)
        truth = fra.resolve(model, sae, tokens, 1, HEAD).channel(*found.example.pair)
        assert np.abs(found.example.contribution - truth.numpy()).max() < 1e-5 * float(truth.abs().max())


def test_rows_as_text_say_the_numbers_that_can_be_seen() -> None:
    rng = np.random.default_rng(0)
    values = np.tril(rng.normal(size=(12, 12)) * (rng.random((12, 12)) < 0.5))
    values[7] = 0
    rows = packed(values)
    seen = np.where(np.abs(values) >= drawings.FAINTEST * np.abs(values).max(), values, 0.0)
    for t, row in enumerate(rows):
        told = drawings.numbers(row)
        assert len(told) <= t + 1
        assert not told or told[-1] != 0
        assert np.abs(np.pad(told, (0, 12 - len(told))) - seen[t]).max() <= 5e-3 * np.abs(values).max()
    assert packed(np.zeros((2, 2))) == ["", ""]


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A dictionary that has an id on Neuronpedia."""
    sae = circuit.dictionary()
    sae.cfg.metadata.neuronpedia_id = ID
    return sae


def test_the_first_channel_that_is_live_is_shown_with_links(named: Any) -> None:
    made = repeated.repeated_random(6, np.arange(48), circuit.N_CTX, circuit.BOS, ("pictures",))
    arms = measure_arms(circuit.model(), named, repeated.collate(made), 1, circuit.HOOK)
    token = int(made[0].tokens[3])
    never = circuit.PREVIOUS + circuit.BOS
    both = np.array([[never, never], [token, circuit.PREVIOUS + token]])
    found = first_example(arms, 0, both)
    assert found is not None
    assert found.example.pair == tuple(both[1].tolist())
    assert {t for t, _ in found.query} == {token}
    page = fra.dictionaries.codes.neuronpedia(named)
    picture = clean(found.picture("here", lambda token: f"<{token}>", page))
    assert picture["pages"] == [f"{PAGES}/{token}", f"{PAGES}/{circuit.PREVIOUS + token}"]
    assert picture["query tokens"][0].startswith(f"'<{token}>' x")
    assert drawings.is_maps(picture)
    assert "pages" not in found.picture("here", str, None)
    assert first_example(arms, 0, both[:1]) is None


def test_a_feature_is_shown_where_it_fires_most_with_its_source() -> None:
    model = tiny("gpt2", torch.float64)
    sae = tiny_sae(Z, dtype="float64", reshape_activations="hook_z")
    with torch.no_grad():
        cache = model.run_with_cache(TOKENS, names_filter=[Z, "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_v"])[1]
        acts = sae.encode(cache[Z].reshape(3, 20, 4, 8))
    for doc, n in enumerate(LENGTHS):
        acts[doc, n:] = 0
    feature = int(acts[:, 1:].amax((0, 1)).argmax())
    doc, pos = divmod(int(acts[:, 1:, feature].argmax()), 19)
    pos += 1
    observed = observe(model, sae, [tokens[:n] for tokens, n in zip(TOKENS, LENGTHS, strict=True)])
    found = feature_example(observed, sae, TOKENS, feature, str, {"L1H2": HEAD})
    assert found is not None
    assert found["feature"] == feature
    assert found["activation"] == pytest.approx(float(acts[doc, pos, feature]))
    fires, source = found["strips"].values()
    start = max(0, pos - 12)
    end = min(LENGTHS[doc], pos + 5)
    assert fires["tokens"] == [str(t) for t in TOKENS[doc, start:end].tolist()]
    assert fires["marked"] == pos - start
    assert drawings.numbers(fires["values"]) == pytest.approx(acts[doc, start:end, feature].tolist(), rel=5e-3)
    weight = sae.W_enc.detach().reshape(4, 8, -1)[HEAD, :, feature]
    by_source = cache["blocks.1.attn.hook_pattern"][doc, HEAD, pos] * (
        cache["blocks.1.attn.hook_v"][doc, :, HEAD] @ weight
    )
    by_source = by_source[: pos + 1].detach().numpy()
    at = int(by_source.argmax())
    window = slice(max(0, at - 5), min(pos + 1, at + 6))
    assert source["marked"] == at - window.start
    assert drawings.numbers(source["values"]) == pytest.approx(by_source[window].tolist(), rel=5e-3)
    assert "pages" not in found
    assert drawings.is_strips(clean(found))
    silent = int((acts.amax((0, 1)) == 0).nonzero()[0, 0])
    assert feature_example(observed, sae, TOKENS, silent, str, {}) is None


def test_rows_about_a_family_show_a_feature_of_it_with_a_link() -> None:
    made = families.layer()
    plain = shown(made, 0)
    assert plain["dictionary"] == families.HOOK
    passed = made.selections[0].features[made.family(0)].tolist()
    assert plain[FEATURE]["feature"] in passed
    assert "pages" not in plain[FEATURE]
    strip = plain[FEATURE]["strips"]["strongest source through L1H0"]
    feature = plain[FEATURE]["feature"]
    assert strip["tokens"][strip["marked"]] == f" {feature}", "feature v of the circuit says that token v comes"
    made.dictionary.cfg.metadata.neuronpedia_id = ID
    assert shown(made, 0)[FEATURE]["pages"] == [f"{PAGES}/{feature}"]


def test_the_term_that_changed_a_loss_most_is_shown(named: Any) -> None:
    model, sae, tokens = tiny("gpt2"), tiny_sae(HOOK), random_tokens(18)
    terms = q12_causal_ranking.measure_terms(model, sae, tokens, 1, np.random.default_rng(0), SingleTerms())
    at = int(np.abs(terms.changed[:, 0]).argmax())
    assert terms.shown is not None
    one = terms.shown.example
    row, key, head = int(terms.row[at]), int(terms.key[at]), int(terms.head[at])
    assert one.pair == tuple(terms.channel[at].tolist())
    assert one.tokens.tolist() == tokens[: row + 3].tolist()
    truth = fra.resolve(model, sae, torch.from_numpy(one.tokens), 1, head).channel(*one.pair)
    assert one.contribution[row, key] != 0
    assert np.abs(one.contribution - truth.numpy()).max() < 1e-5 * float(truth.abs().max())
    target: Any = SimpleNamespace(tokenizer=None, dictionary_for=lambda layer: (HOOK, named))
    (shown_as,) = q12_causal_ranking.largest_term(target, 0.5, 1, terms).values()
    assert shown_as["document"].startswith(f"L1H{head}:")
    assert shown_as["term"].startswith(f"query {row}, key {key}:")
    assert shown_as["pages"][0] == f"{PAGES}/{one.pair[0]}"


def test_pairs_on_natural_text_are_drawn_where_they_were_measured() -> None:
    model, sae = tiny("gpt2"), tiny_sae(HOOK)
    arm = measure_arm(model, sae, TOKENS, 1, HOOK)
    often = torch.bincount(arm.codes.feature).topk(2).indices.tolist()
    layer = object.__new__(layers.PairLayer)  # of what is measured, only codes and documents are asked for
    layer.arms, layer.texts = {layers.MEASURED: arm}, {layers.MEASURED: Texts(TOKENS, tuple(LENGTHS), ("a", "b", "c"))}

    class Made(layers.PairLayers):
        def __init__(self) -> None:
            self.target: Any = SimpleNamespace(tokenizer=None, dictionary_for=lambda _: (HOOK, sae))

        def __getitem__(self, number: int) -> layers.PairLayer:
            return layer

    for head in range(4):
        alone = example_on_text(arm, head, (often[0], often[1]), TOKENS, LENGTHS)
        assert alone is not None
        found = Made().picture(f"L1H{head}", often)
        assert found == {pictures.STRONGEST: alone.picture(pictures.ON_NATURAL, str, None)}


def test_tokens_without_a_tokenizer_are_their_ids() -> None:
    assert text_of(None)(7) == "7"
