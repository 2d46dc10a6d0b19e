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
from fra.measures.concepts import q21_layers
from fra.measures.concepts.designs import Concepts, ConceptTexts
from fra.measures.concepts.q21_concepts import ConceptScreen, screened
from fra.measures.concepts.q21_layers import ConceptLayers, LayerConcepts, best, concept_texts, split
from fra.measures.concepts.q21_planting import PlantedChannels, plant_concepts, planted_and_found
from fra.measures.concepts.q21_search import ConceptEffects, ConceptSearch, HeadOnText, MarkedTexts, example_of, texts
from fra.targets.target import load_target
from fra.tests import circuit
from fra.tests.claims import claim
from fra.tests.models import N_CTX, tiny, tiny_sae

HOOK = "blocks.1.ln1.hook_normalized"
DESIGN = Concepts()
KINDS = 6
"""Kinds of tokens; token v is of kind v % KINDS."""


def random_texts(n: int, seed: int, length: int = N_CTX, vocabulary: int = 40) -> MarkedTexts:
    rng = np.random.default_rng(seed)
    documents = [[0, *rng.integers(1, vocabulary, length - 1).tolist()] for _ in range(n)]
    return texts(documents, [f"s{k}" for k in range(n)], True)


def brute(
    text: MarkedTexts, arm: Arm, head: int, pair: tuple[int, int], lag: int, within: int = 4
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
                stratum = (tokens[s], int(np.log2(t - s)), s // within)
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
def test_effect_is_that_of_a_loop_over_keys(kind: str, lag: int) -> None:
    """Softcap, window and rotary embeddings included."""
    every = Concepts(rows=10_000)
    text = random_texts(12, 1, vocabulary=12)
    hook = "blocks.1.hook_resid_pre" if kind == "gemma2" else HOOK
    arm = measure_arm(tiny(kind), tiny_sae(hook), text.tokens, 1, hook)
    assert int((text.first.sum(1)).max()) <= 12
    frequent = torch.bincount(arm.codes.feature).topk(3).indices.tolist()
    pairs = torch.tensor([[frequent[0], frequent[1]], [frequent[2], frequent[0]]])
    for run in (4, 1, 32):
        found = HeadOnText(text, arm, 2, Concepts(rows=10_000, run=run)).channels(pairs, lag)
        for n, pair in enumerate(pairs.tolist()):
            mean, count = brute(text, arm, 2, (pair[0], pair[1]), lag, run)
            assert count >= 3
            assert found.weight.sum(0)[n] == pytest.approx(count)
            assert found.nats.sum(0)[n] / found.weight.sum(0)[n] == pytest.approx(mean, abs=2e-5)
    assert HeadOnText(text, arm, 2, every).channels(pairs, lag).mean().tolist() == [-np.inf, -np.inf], "12 documents"


def test_search_is_the_sum_over_rows_and_keys() -> None:
    text = random_texts(40, 2, vocabulary=30)
    arm = measure_arm(tiny("gpt2"), tiny_sae(HOOK), text.tokens, 1, HOOK)
    search = ConceptSearch(text, arm, DESIGN)
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


def layer(model, sae, measured: int = 4, design: Concepts = DESIGN) -> tuple[LayerConcepts, list[Arm]]:
    both = [random_texts(n, seed, circuit.N_CTX, circuit.D_VOCAB - 1) for n, seed in ((50, 3), (100, measured))]
    both = [texts([[circuit.BOS, *row[1:].tolist()] for row in t.tokens], t.sources, True) for t in both]
    arms = [measure_arm(model, sae, t.tokens, 1, circuit.HOOK) for t in both]
    return LayerConcepts(ConceptSearch(both[0], arms[0], design), both[1], arms[1], ("kinds",), design), arms


def test_channels_of_kinds_are_found_by_their_ids_and_nulls_are_not() -> None:
    own, arms = layer(kinds_circuit(), kinds_dictionary())
    pairs, _ = own.candidates(0)
    planted = {(k, circuit.PREVIOUS + k) for k in range(KINDS)}
    assert {tuple(p) for p in pairs.tolist()[:KINDS]} == planted
    effects = own.on(0).channels(pairs)
    # a removed channel is worth its strength at stripe keys; a little more where the row has no other such key
    assert (effects.mean()[:KINDS] > 3).all()
    assert (effects.mean("contrast")[:KINDS] > 3).all()
    # a scramble keeps the head's spread of scores, so that one of 36 random couplings is worth something, now and then
    # more than the head's
    drawn = [own.scrambled(0, k) for k in range(6)]
    assert np.median(drawn) < 0.7 * effects.mean()[:KINDS].min()
    assert own.scrambled(0, 3) == drawn[3] and len(set(drawn)) == 6
    lags = own.other_lags([0, 1])
    assert lags.shape == (DESIGN.lags, 2)
    for row, lag in ((0, 2), (3, 5)):
        at_lag = own.search.stripe(lag).strongest(arms[0], 0)[0]
        assert lags[row, 0] == best(own.on(0).channels(at_lag, lag)) < 1.0
    assert best(own.on(1).channels(own.candidates(1)[0])) < 0.5


def test_random_atoms_are_drawn_anew_for_every_k() -> None:
    few, both = Concepts(live_in=4), [random_texts(40, seed, vocabulary=12) for seed in (1, 2)]
    arms = [measure_arm(tiny("gpt2"), tiny_sae(HOOK), text.tokens, 1, HOOK) for text in both]
    own = LayerConcepts(ConceptSearch(both[0], arms[0], few), both[1], arms[1], ("atoms",), few)
    first, again, second = (own.atoms([0, 1], k) for k in (0, 0, 1))
    assert first == again != second and np.isfinite(first).all()


CLAIM = claim("Q21")


class MadeLayers(ConceptLayers):
    """Layers that a test made; layer 0 is without a channel."""

    def __init__(self, layers: dict[int, LayerConcepts]) -> None:
        self.design, self._layers = layers[1].design, layers
        text = layers[1].text
        self.texts = {"confirmation": text}
        self.target = SimpleNamespace(
            name="kinds",
            heads=("L0H0", "L1H0", "L1H1", "L2H0"),
            n_heads=2,
            tokenizer=None,
            dictionary_for=lambda _: ("", circuit.dictionary()),
        )

    def __iter__(self):
        return iter(self._layers)

    def __getitem__(self, number: int) -> LayerConcepts:
        return self._layers[number]


@pytest.fixture(scope="module")
def kinds() -> LayerConcepts:
    """The circuit of kinds, its atoms few; rows enough that a channel is live in nearly every document. Of two heads,
    one of 13 channels passes in sources_for(0.05 / 2, 13) = 83 of them.
    """
    return layer(kinds_circuit(), kinds_dictionary(), design=Concepts(rows=400))[0]


def screen(own: LayerConcepts, control: float | None = 0.0) -> ConceptScreen:
    found = ConceptScreen(CLAIM, MadeLayers({1: own}))
    found.controls = {} if control is None else {"L0H0": control}
    found.control = np.nan if control is None else control
    return found


def test_verdicts_on_the_circuit_of_kinds(kinds: LayerConcepts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole screen: yes for the head that matches kinds, no for the head without a purpose; nulls are drawn for
    the first alone.
    """
    monkeypatch.setattr(LayerConcepts, "atoms", lambda self, heads, k: [0.1 * k for _ in heads])
    asked: list[int] = []
    monkeypatch.setattr(LayerConcepts, "scrambled", lambda self, head, k: asked.append(head) or 1e-3 * k)
    evidence = screened(screen(kinds))
    assert list(evidence) == ["L0H0", "L2H0", "L1H0", "L1H1"]
    verdicts = {name: judge(CLAIM, e) for name, e in evidence.items()}
    assert verdicts["L1H0"].outcome is Outcome.SUPPORTED, verdicts["L1H0"].reason
    assert verdicts["L1H1"].outcome in (Outcome.INCONCLUSIVE, Outcome.REFUTED)
    assert (verdicts["L0H0"].outcome, verdicts["L2H0"].outcome) == (Outcome.NOT_APPLICABLE, Outcome.CANNOT_RUN)
    assert set(asked) == {0} and evidence["L1H0"].n == 100
    passing = {
        name
        for name, conditions in evidence["L1H0"].candidates.items()
        if all(c.holds(CLAIM.level) for c in conditions)
    }
    assert passing == {f"{k} -> {circuit.PREVIOUS + k}" for k in range(KINDS)}
    largest = {c.name: c for c in next(iter(evidence["L1H0"].candidates.values()))}
    assert largest["effect"].effect - largest["over random atoms"].effect == pytest.approx(1.9), "of twenty the largest"
    # what a row shows: from a row that repeats no token, to a key whose predecessor is of the row's kind
    i, j = map(int, next(iter(passing)).split(" -> "))
    shown = example_of(kinds.text, kinds.confirmation, 0, (i, j))
    assert shown is not None
    tokens, F = shown.example.tokens, shown.example.contribution
    new = [t for t in range(1, len(tokens)) if tokens[t] not in tokens[1:t] and tokens[t] % KINDS == i]
    assert max(F[t, s] for t in new for s in range(2, t) if tokens[s - 1] % KINDS == i) > 1


@pytest.mark.parametrize(
    ("what", "name"),
    [("control", "over layer-0 heads"), ("lags", "over other lags"), ("atoms", "over random atoms"), ("none", "")],
)
def test_any_null_can_deny_and_none_refutes(
    kinds: LayerConcepts, what: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LayerConcepts, "other_lags", lambda self, heads: np.full((20, len(heads)), 0.0))
    monkeypatch.setattr(LayerConcepts, "atoms", lambda self, heads, k: [0.0 for _ in heads])
    monkeypatch.setattr(LayerConcepts, "scrambled", lambda self, head, k: 1e-3)
    if what == "lags":  # one of twenty is enough
        monkeypatch.setattr(
            LayerConcepts,
            "other_lags",
            lambda self, heads: np.where(np.arange(20) == 7, 99.0, 0.0)[:, None] + 0 * np.array(heads),
        )
    if what == "atoms":
        monkeypatch.setattr(LayerConcepts, "atoms", lambda self, heads, k: [99.0 if k == 13 else 0.0 for _ in heads])
    if what == "none":
        monkeypatch.setattr(LayerConcepts, "scrambled", lambda self, head, k: 99.0)
        name = "over scrambled heads"
    found = screen(kinds, 99.0 if what == "control" else 0.0)
    verdict = judge(CLAIM, screened(found)["L1H0"])
    assert verdict.outcome is Outcome.INCONCLUSIVE
    conditions = next(iter(verdict.evidence.candidates.values()))
    assert [c.name for c in conditions if c.finite and not c.holds(CLAIM.level)] == [name]
    if what == "control":  # what comes after is not searched for
        assert not found.lags and not found.atoms
        # a target without a dictionary at layer 0 has no such control: what was not measured does not pass
        without = judge(CLAIM, screened(screen(kinds, None))["L1H0"])
        assert without.outcome is Outcome.INCONCLUSIVE and "was not measured" in without.reason


def test_what_is_searched_does_not_depend_on_what_is_measured() -> None:
    """Other confirmation documents: the same candidates, to the bit, at every lag; other effects."""
    one, other = (layer(kinds_circuit(), kinds_dictionary(), measured=seed)[0] for seed in (4, 9))
    for head in (0, 1):
        (pairs, values), (again, same) = one.candidates(head), other.candidates(head)
        assert torch.equal(pairs, again) and np.array_equal(values, same)
    effects = [own.on(0).channels(own.candidates(0)[0]).mean() for own in (one, other)]
    assert not np.array_equal(*effects)


def test_layers_are_searched_on_discovery_and_measured_on_confirmation() -> None:
    rng = np.random.default_rng(8)
    words = [
        SimpleNamespace(text=rng.integers(0, circuit.D_VOCAB - 1, circuit.N_CTX - 1).tolist(), source=f"s{k % 50}")
        for k in range(90)
    ]
    target = SimpleNamespace(
        name="kinds",
        model=kinds_circuit(),
        n_layers=2,
        bos=circuit.BOS,
        documents=lambda: words,
        tokens=lambda text, n: torch.tensor([circuit.BOS, *text][:n]),
        hook_for=lambda layer: circuit.HOOK if layer == 1 else None,
        dictionary_for=lambda layer: (circuit.HOOK, kinds_dictionary()),
    )
    made = ConceptLayers(target, ConceptTexts(discovery=40, confirmation=40), Concepts(live_in=10))
    own = made[1]
    for arm, text, name in (
        (own.search.arm, own.search.text, "discovery"),
        (own.confirmation, own.text, "confirmation"),
    ):
        assert text is made.texts[name]
        again = measure_arm(target.model, kinds_dictionary(), text.tokens, 1, circuit.HOOK)
        assert torch.equal(again.frozen.x, arm.frozen.x)
    assert not set(made.texts["discovery"].sources) & set(made.texts["confirmation"].sources)


def test_scrambles_are_stretched_to_the_heads_spread(kinds: LayerConcepts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any stretch left, nothing of the head is."""
    assert kinds.scrambled(0, 0) > 1
    monkeypatch.setattr(q21_layers, "stretch_to_match", lambda *_: 0.0)
    assert kinds.scrambled(0, 0) == -np.inf, "no channel has a coupling"


def test_no_source_is_both_searched_on_and_measured() -> None:
    found = concept_texts(load_target("mini"), ConceptTexts(), DESIGN.live_in)
    discovery, confirmation = (found[name].sources for name in ("discovery", "confirmation"))
    assert (len(discovery), len(set(discovery)), len(confirmation), len(set(confirmation))) == (120, 30, 200, 200)
    assert not set(discovery) & set(confirmation)
    times = {d.source: 0 for d in load_target("mini").documents()}
    for d in load_target("mini").documents():
        times[d.source] += 1
    assert all(times[s] > 1 for s in discovery) and all(times[s] == 1 for s in confirmation)
    few = split([f"s{k % 60}" for k in range(180)], ConceptTexts(), 20, ("x",))  # no single source: drawn
    of = {name: {k % 60 for k in numbers} for name, numbers in few.items()}
    assert not of["discovery"] & of["confirmation"] and len(of["confirmation"]) > 30


def test_planted_channels_lie_beyond_their_bars_and_go_through_every_condition(kinds: LayerConcepts) -> None:
    batches = list(plant_concepts(kinds, 1, CLAIM))
    assert batches, "no channel could be planted"
    for batch in batches:
        for part in ("nats", "contrast"):
            assert (batch.effects.mean(part) >= 0.2 - 1e-6).all()
        assert np.median(batch.means) < 0.5
    own = screen(kinds)
    own.lags, own.atoms = {"L1H1": 0.0}, {"L1H1": 0.0}
    own.scramble = lambda name, k: 0.0
    batch = max(batches, key=lambda b: len(b.chosen))
    e = batch.effects  # channels that all documents show: only what is asked for here may deny them
    shown = e.weight * (1 + 0.1 * np.random.default_rng(0).standard_normal(e.weight.shape))
    clear = dataclasses.replace(e, nats=shown, contrast=shown)
    strong = PlantedChannels(clear, np.ones(len(batch.chosen), dtype=bool))
    free = own.passes("L1H1", strong)
    assert free.any()
    for change in ("lags", "atoms"):
        setattr(own, change, {"L1H1": 99.0})
        assert not own.passes("L1H1", strong).any()
        setattr(own, change, {"L1H1": 0.0})
    own.control = 99.0
    assert not own.passes("L1H1", strong).any()
    own.control = 0.0
    own.scramble = lambda name, k: 99.0
    assert not own.passes("L1H1", strong).any()
    own.scramble = lambda name, k: 0.0
    assert not own.passes("L1H1", dataclasses.replace(strong, chosen=np.zeros(len(batch.chosen), dtype=bool))).any()


def test_planting_counts_what_is_found_and_ends_where_it_is_hopeless() -> None:
    effects = ConceptEffects(*np.ones((3, 4, 5)), np.full(5, 4), 1)

    def batches(n: int):
        for _ in range(n):
            yield PlantedChannels(effects, np.array([True, True, True, True, False]))

    most = planted_and_found(batches(99), lambda b: np.ones(5, dtype=bool), 100)
    assert (most.found, most.tried) == (56, 70), "14 missed of 100 leave a bound below 0.8"
    none = planted_and_found(batches(99), lambda b: np.zeros(5, dtype=bool), 100)
    assert none.found == 0 and none.tried < 100 and np.isnan(none.power)
    always = (PlantedChannels(effects, np.ones(5, dtype=bool)) for _ in range(99))
    every = planted_and_found(always, lambda b: np.ones(5, dtype=bool), 100)
    assert (every.found, every.tried) == (100, 100) and every.power > 0.95


def test_token_matching_has_no_conceptual_channel() -> None:
    """The plain circuit, whose head matches tokens, with a dictionary of tokens: rows repeat none of them."""
    own, _ = layer(circuit.model(), circuit.dictionary())
    effects = own.on(0).channels(own.candidates(0)[0])
    assert effects.documents.max(initial=0) == 0 or best(effects) < 0.1


def test_rows_of_a_feature_are_limited() -> None:
    own, _ = layer(kinds_circuit(), kinds_dictionary())
    grid = own.on(0).grid(torch.tensor([[0, circuit.PREVIOUS]]), 1)
    assert len(grid.doc) == DESIGN.rows
    assert torch.unique(grid.doc).numel() > 25
    assert own.text.first[grid.doc, grid.pos].all()
