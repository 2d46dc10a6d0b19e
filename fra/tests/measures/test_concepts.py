"""Conceptual induction on text that repeats no token: matching, search and effect against loops over float64, and a
circuit in which one word's kind predicts what follows it.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fra.claim import Outcome, judge
from fra.core.coded import Arm, measure_arm
from fra.measures.pairs import q21_search
from fra.measures.pairs.q21_concepts import Concepts, LayerConcepts, best, concept_evidence, control, plain_mean
from fra.measures.pairs.q21_search import ROWS, ConceptSearch, HeadOnText, MarkedTexts, example_of, texts
from fra.tests import circuit
from fra.tests.claims import claim
from fra.tests.models import N_CTX, tiny, tiny_sae

HOOK = "blocks.1.ln1.hook_normalized"
KINDS = 6
"""Kinds of tokens; token v is of kind v % KINDS."""


def random_texts(n: int, seed: int, length: int = N_CTX, vocabulary: int = 40) -> MarkedTexts:
    rng = np.random.default_rng(seed)
    documents = [[0, *rng.integers(1, vocabulary, length - 1).tolist()] for _ in range(n)]
    return texts(documents, [f"s{k}" for k in range(n)], True)


def brute(
    text: MarkedTexts, arm: Arm, head: int, pair: tuple[int, int], lag: int, within: int | None = None
) -> tuple[float, int]:
    """Effect of one channel and its number of matched stripe keys, cell by cell in float64."""
    frozen = arm.frozen.to(torch.float64)
    codes = arm.codes.dense().double() / frozen.sigma[:, :, None]
    i, j = pair
    n_docs, length = text.tokens.shape
    scores = frozen.scores(head)
    U, V = arm.codes.decoder.double() @ frozen.W_q[head], arm.codes.decoder.double() @ frozen.W_k[head]
    cells = []
    for d in range(n_docs):
        tokens = text.tokens[d].tolist()
        for t in range(1, length):
            if codes[d, t, i] == 0 or tokens[t] in tokens[1:t]:
                continue
            F = torch.zeros(t + 1, dtype=torch.float64)
            for u in range(t + 1):
                q, k = U[i], V[j]
                if frozen.rotary is not None:
                    q = frozen.rotary.rotate(q[None], torch.tensor([t]))[0]
                    k = frozen.rotary.rotate(k[None], torch.tensor([u]))[0]
                F[u] = frozen.scale * codes[d, t, i] * codes[d, u, j] * (q @ k)
            seen = frozen.mask[t, : t + 1]
            row = scores[d, t, : t + 1]
            before = frozen.cap(row).masked_fill(~seen, -torch.inf)
            after = frozen.cap(row - F).masked_fill(~seen, -torch.inf)

            def odds(row: torch.Tensor, s: int) -> float:
                other = torch.cat([row[:s], row[s + 1 :]])
                return float(row[s] - other.logsumexp(0))

            for s in range(1 + lag, t):
                if not seen[s]:
                    continue
                stratum = (tokens[s], int(np.log2(t - s)), int(np.log2(s)) if within is None else s // within)
                cells.append((stratum, codes[d, s - lag, i] != 0, odds(before, s) - odds(after, s)))
    total, n = 0.0, 0
    for stratum in {c[0] for c in cells}:
        yes = [c[2] for c in cells if c[0] == stratum and c[1]]
        no = [c[2] for c in cells if c[0] == stratum and not c[1]]
        if yes and no:
            total += sum(yes) - len(yes) * float(np.mean(no))
            n += len(yes)
    return total / n, n


@pytest.mark.parametrize(("kind", "lag"), [("gpt2", 1), ("gpt2", 3), ("gemma2", 1), ("pythia", 1)])
def test_effect_is_that_of_a_loop_over_keys(kind: str, lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Softcap, window and rotary embeddings included."""
    monkeypatch.setattr(q21_search, "ROWS", 10_000)
    text = random_texts(12, 1, vocabulary=12)
    hook = "blocks.1.hook_resid_pre" if kind == "gemma2" else HOOK
    arm = measure_arm(tiny(kind), tiny_sae(hook), text.tokens, 1, hook)
    assert int((text.first.sum(1)).max()) <= 12
    frequent = torch.bincount(arm.codes.feature).topk(3).indices.tolist()
    pairs = torch.tensor([[frequent[0], frequent[1]], [frequent[2], frequent[0]]])
    found = HeadOnText(text, arm, 2).channels(pairs, lag)
    for n, pair in enumerate(pairs.tolist()):
        mean, count = brute(text, arm, 2, (pair[0], pair[1]), lag)
        assert count >= 10
        assert found.weight.sum(0)[n] == pytest.approx(count)
        assert found.nats.sum(0)[n] / found.weight.sum(0)[n] == pytest.approx(mean, abs=2e-5)
    if lag == 3:
        near = HeadOnText(text, arm, 2).channels(pairs[:1], lag, run=4)
        mean, count = brute(text, arm, 2, (int(pairs[0, 0]), int(pairs[0, 1])), lag, within=4)
        assert near.weight.sum() == pytest.approx(count)
        assert plain_mean(near)[0] == pytest.approx(mean, abs=2e-5)
        monkeypatch.setattr(q21_search, "FLOOR_DOCUMENTS", 1)
        first, finer = control(HeadOnText(text, arm, 2), pairs)
        means = HeadOnText(text, arm, 2).channels(pairs).mean()
        strongest = tuple(pairs[int(means.argmax())].tolist())
        assert first == means.max()
        assert finer == pytest.approx(brute(text, arm, 2, strongest, 1, within=4)[0], abs=2e-5)
        assert np.isnan(control(HeadOnText(text, arm, 2), pairs[:0])[1])


def test_search_is_the_sum_over_rows_and_keys() -> None:
    text = random_texts(40, 2, vocabulary=30)
    arm = measure_arm(tiny("gpt2"), tiny_sae(HOOK), text.tokens, 1, HOOK)
    search = ConceptSearch(text, arm)
    stripe = search.stripe(2)
    a = arm.codes.dense().double().numpy()
    a[:, 0] = 0
    tokens = text.tokens.numpy()
    mean = {v: a[tokens == v].mean(0) for v in np.unique(tokens[:, 1:]) if (tokens[:, 1:] == v).sum() >= 2}
    rng = np.random.default_rng(0)
    for _ in range(6):
        row, column = rng.integers(0, len(stripe.queries)), rng.integers(0, len(search.key_features))
        i, j = stripe.queries[row], search.key_features[column]
        expected = 0.0
        for d in range(len(tokens)):
            for t in range(1, N_CTX):
                if tokens[d, t] in tokens[d, 1:t] or a[d, t, i] == 0:
                    continue
                for s in range(3, t):
                    if a[d, s - 2, i] != 0 and tokens[d, s] in mean:
                        expected += a[d, t, i] * (a[d, s, j] - mean[tokens[d, s]][j])
        assert stripe.position_part[row, column] == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_rows_repeat_no_token_and_padding_is_no_text() -> None:
    text = texts([[0, 5, 6, 5, 7, 6], [0, 8, 8]], ["a", "b"], True)
    assert text.first.tolist() == [[False, True, True, False, True, False], [False, True, False, False, False, False]]
    assert text.valid[1].tolist() == [False, True, True, False, False, False]


def kinds_circuit(strength: float = 6.0):
    """L1H0 attends to keys whose previous token is of the query token's kind: the circuit, with kinds for tokens."""
    model = circuit.model(strength)
    attention = model.blocks[1].attn
    v = torch.arange(circuit.D_VOCAB - 1)
    with torch.no_grad():
        for weight, start in ((attention.W_Q, 0), (attention.W_K, circuit.PREVIOUS)):
            rows = weight[0, start + v % KINDS].clone()
            weight[0, start + v] = rows
    return model


def kinds_dictionary():
    """A feature for each kind of token and of previous token; what tells tokens of a kind apart is error."""
    sae = circuit.dictionary()
    v = torch.arange(circuit.D_VOCAB - 1)
    with torch.no_grad():
        for start in (0, circuit.PREVIOUS):
            sae.W_enc[:, start + v] = 0.0
            sae.W_enc[start + v, start + v % KINDS] = 1.0
            for kind in range(KINDS):
                sae.W_dec[start + kind] = 0.0
                members = v[v % KINDS == kind]
                sae.W_dec[start + kind, start + members] = 1.0 / len(members)
    return sae


def layer(model, sae) -> tuple[LayerConcepts, list[Arm]]:
    both = [random_texts(50, seed, circuit.N_CTX, circuit.D_VOCAB - 1) for seed in (3, 4)]
    both = [texts([[circuit.BOS, *row[1:].tolist()] for row in t.tokens], t.sources, True) for t in both]
    arms = [measure_arm(model, sae, t.tokens, 1, circuit.HOOK) for t in both]
    return LayerConcepts(ConceptSearch(both[0], arms[0]), both[1], arms[1], ("kinds",)), arms


def test_channels_of_kinds_are_found_by_their_ids_and_nulls_are_not() -> None:
    own, arms = layer(kinds_circuit(), kinds_dictionary())
    stripe = own.search.stripe(1)
    pairs, _ = stripe.strongest(arms[0], 0)
    planted = {(k, circuit.PREVIOUS + k) for k in range(KINDS)}
    assert {tuple(p) for p in pairs.tolist()[:KINDS]} == planted
    on = HeadOnText(own.text, own.confirmation, 0)
    effects = on.channels(pairs)
    # a removed channel is worth its strength at stripe keys; a little more where the row has no other such key
    assert (effects.mean()[:KINDS] > 3).all()
    assert (effects.mean("contrast")[:KINDS] > 3).all()
    # a scramble keeps the head's spread of scores, so that one of 36 random couplings is worth something
    assert max(own.scrambles(stripe, 0)) < effects.mean()[:KINDS].max()
    assert np.median(own.scrambles(stripe, 0)) < 0.5 * effects.mean()[:KINDS].min()
    for lag in (2, 5):
        assert best(on.channels(own.search.stripe(lag).strongest(arms[0], 0)[0], lag)) < 1.0
    other = stripe.strongest(arms[0], 1)[0]
    assert best(HeadOnText(own.text, own.confirmation, 1).channels(other)) < 0.5


CLAIM = claim("Q21")


def test_verdicts_on_the_circuit_of_kinds() -> None:
    """The whole screen: yes for the head that matches kinds, no for the head without a purpose."""
    own, _ = layer(kinds_circuit(), kinds_dictionary())
    heads = own.heads([0, 1])
    decoded = SimpleNamespace(tokenizer=SimpleNamespace(decode=str), heads=("L0H0", "L1H0", "L1H1", "L2H0"))
    lists = {name: own.live_tokens(h.pairs, decoded) for name, h in heads.items()}
    found = Concepts("kinds", heads, {"L0H0": 0.0}, {"L0H0": 0.0}, own.text.sources, lists)
    evidence = concept_evidence(CLAIM, decoded, found)
    assert list(evidence) == ["L0H0", "L2H0", "L1H0", "L1H1"]
    outcomes = {name: judge(CLAIM, e).outcome for name, e in evidence.items()}
    assert outcomes["L1H0"] is Outcome.SUPPORTED, judge(CLAIM, evidence["L1H0"]).reason
    assert outcomes["L1H1"] in (Outcome.INCONCLUSIVE, Outcome.REFUTED)
    assert (outcomes["L0H0"], outcomes["L2H0"]) == (Outcome.NOT_APPLICABLE, Outcome.CANNOT_RUN)
    passing = {
        name
        for name, conditions in evidence["L1H0"].candidates.items()
        if all(c.holds(CLAIM.level) for c in conditions)
    }
    assert passing == {f"{k} -> {circuit.PREVIOUS + k}" for k in range(KINDS)}
    assert heads["L1H0"].planted_found <= heads["L1H0"].planted
    # what a row shows: from a row that repeats no token, to a key whose predecessor is of the row's kind
    i, j = map(int, next(iter(passing)).split(" -> "))
    shown = example_of(own.text, own.confirmation, 0, (i, j))
    assert shown is not None
    tokens, F = shown.example.tokens, shown.example.contribution
    new = [t for t in range(1, len(tokens)) if tokens[t] not in tokens[1:t] and tokens[t] % KINDS == i]
    assert max(F[t, s] for t in new for s in range(2, t) if tokens[s - 1] % KINDS == i) > 1
    pictures = {"L1H0": shown.picture("here", str, None)}
    row = concept_evidence(CLAIM, decoded, dataclasses.replace(found, pictures=pictures))["L1H0"]
    assert row.detail["best channel on a document"] == pictures["L1H0"]
    # the control decides: a layer-0 head, which cannot have such a channel, reaches more
    denied = concept_evidence(CLAIM, decoded, dataclasses.replace(found, controls={"L0H0": 99.0}))["L1H0"]
    assert judge(CLAIM, denied).outcome is Outcome.INCONCLUSIVE
    # a target without a dictionary at layer 0 has no such control: what was not measured does not pass
    without = judge(CLAIM, concept_evidence(CLAIM, decoded, dataclasses.replace(found, controls={}))["L1H0"])
    assert without.outcome is Outcome.INCONCLUSIVE and "was not measured" in without.reason


def test_token_matching_has_no_conceptual_channel() -> None:
    """The plain circuit, whose head matches tokens, with a dictionary of tokens: rows repeat none of them."""
    own, arms = layer(circuit.model(), circuit.dictionary())
    pairs, _ = own.search.stripe(1).strongest(arms[0], 0)
    effects = HeadOnText(own.text, own.confirmation, 0).channels(pairs)
    assert effects.documents.max(initial=0) == 0 or best(effects) < 0.1


def test_rows_of_a_feature_are_limited() -> None:
    own, _ = layer(kinds_circuit(), kinds_dictionary())
    grid = HeadOnText(own.text, own.confirmation, 0).grid(torch.tensor([[0, circuit.PREVIOUS]]), 1)
    assert len(grid.doc) == ROWS
    assert torch.unique(grid.doc).numel() > 25
    assert own.text.first[grid.doc, grid.pos].all()
