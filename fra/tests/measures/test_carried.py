"""What features carry: the token dictionary, R2, truncation and masses, each against another way to the same number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats as sps

from fra import resolve
from fra.claim import Claim, Outcome, judge
from fra.core.coded import Arm
from fra.core.frozen import FrozenLayer, freeze
from fra.dictionaries.codes import codes
from fra.dictionaries.tokens import learn, shrinkage
from fra.errors import FraError
from fra.measures.scores.designs import Concentration, StrongestChannels, Truncation
from fra.measures.scores.layer import FEATURES, SHUFFLED, TOKENS, CarriedLayer, Sets, document_sets, texts
from fra.measures.scores.masses import concentration, document, fewest, live_channels, masses, numbered
from fra.measures.scores.q02_q14_fidelity import (
    carried_part,
    carrying,
    chances,
    fits,
    rank_within_position,
    real_entries,
    strongest,
    truncation,
)
from fra.measures.scores.q03_q15_sparsity import content, first_key, sparsity, strongest_channels
from fra.search.nulls import draw_atoms, random_atoms
from fra.statistics.stats import ClusterMeans, seed_of
from fra.statistics.unseen import sources_for
from fra.stimuli.designs import NaturalSets
from fra.stimuli.padding import Texts
from fra.tests import circuit, models
from fra.tests.claims import claim as declared
from fra.verdicts.samples import ByDocument, paired_evidence

KINDS = {
    "gpt2": "blocks.1.ln1.hook_normalized",
    "llama": "blocks.1.hook_resid_pre",
    "gemma2": "blocks.1.hook_resid_pre",
}
"""Without rotary positions; with them and grouped keys; with a softcap and a sliding window too."""
LENGTHS = (20, 14, 17)


def sets(n: int = 24, n_vocab: int = models.D_VOCAB) -> Sets:
    """Random documents of a small vocabulary in three sets, of unequal length in each."""
    rng = np.random.default_rng(3)
    made = [(f"s{k}", [0, *rng.integers(1, n_vocab, LENGTHS[k // 3 % 3] - 1).tolist()]) for k in range(n)]
    return Sets(*(texts(made[k::3], 20) for k in range(3)))


def layer(kind: str, n: int = 24, n_vocab: int = models.D_VOCAB) -> CarriedLayer:
    """A layer of a tiny model with a random dictionary."""
    hook = KINDS[kind]
    return CarriedLayer(models.tiny(kind), models.tiny_sae(hook), sets(n, n_vocab), 1, hook, seed_parts=("t", kind))


@pytest.fixture(scope="module", params=KINDS)
def any_layer(request: pytest.FixtureRequest) -> CarriedLayer:
    """One of each kind."""
    return layer(request.param)


def brute_mass(own: CarriedLayer, number: int, head: int) -> torch.Tensor:
    """sum A |F - sum_u A F| of every channel, from whole terms of `resolve` and the model's own pattern, in double."""
    length = own.sets.measured.lengths[number]
    tokens = own.sets.measured.tokens[number, :length]
    terms = resolve(own.model, own.sae, tokens, 1, head).to_sparse().to_dense().double()  # q k i j
    _, cache = own.model.run_with_cache(tokens[None])
    pattern = cache["blocks.1.attn.hook_pattern"][0, head].double()[..., None, None]
    mean = (pattern * terms).sum(1, keepdim=True)
    return (pattern * (terms - mean).abs()).sum((0, 1))


def test_masses_are_those_of_whole_terms(any_layer: CarriedLayer) -> None:
    """In closed form and in blocks: every channel's mass, the first key's part and the number of live channels."""
    frozen, given = any_layer.frozen, any_layer.codes(FEATURES)
    for number, head in ((1, 0), (2, 3)):  # both are shorter than the padding
        doc = document(given, number, any_layer.sets.measured.lengths[number])
        expected = brute_mass(any_layer, number, head)
        found = masses(frozen, given.decoder, doc, head).double()
        torch.testing.assert_close(found, expected[doc.live][:, doc.live], atol=1e-5, rtol=1e-4)
        tokens = any_layer.sets.measured.tokens[number, : doc.length]
        count = resolve(any_layer.model, any_layer.sae, tokens, 1, head).channels(reduce="count")
        assert live_channels(frozen, doc) == len(count)


def test_the_first_key_has_its_part(any_layer: CarriedLayer) -> None:
    """Mass at key 0 and what is drawn there, against whole terms."""
    frozen, given, head = any_layer.frozen, any_layer.codes(FEATURES), 1
    number, length = 2, any_layer.sets.measured.lengths[2]
    tokens = any_layer.sets.measured.tokens[number, :length]
    whole = resolve(any_layer.model, any_layer.sae, tokens, 1, head)
    pairs = torch.tensor(whole.channels(n=8)[["q_feature", "k_feature"]].to_numpy())
    pairs = torch.cat((pairs, torch.tensor([[0, models.D_SAE - 1]])))
    pattern = frozen.pattern[number, head, :length, :length].double().masked_fill(~frozen.mask[:length, :length], 0)
    mass = first = drawn = 0.0
    for i, j in pairs.tolist():
        term = whole.channel(i, j).double()
        around = pattern * (term - (pattern * term).sum(1, keepdim=True))
        mass += float(around.abs().sum())
        first += float(around[:, 0].abs().sum())
        drawn += float(around[:, 0].clamp(min=0).sum())
        assert float(around.clamp(min=0).sum()) == pytest.approx(float(around.abs().sum()) / 2, rel=1e-3, abs=1e-6)
    found = first_key(frozen, given, any_layer.sets.measured.lengths, head, pairs)
    ours = [float(part[number]) for part in (found.mass, found.at_first, found.drawn_to_first)]
    assert ours == pytest.approx([mass, first, drawn], rel=1e-3, abs=1e-6)
    assert bool((found.at_first <= found.mass / 2 * (1 + 1e-5)).all()), "no key holds more than half"


def test_the_strongest_channels_are_those_with_the_largest_mass() -> None:
    """Over several documents."""
    own = layer("gpt2")
    own_texts, given = own.sets.measured, own.codes(FEATURES)
    total = torch.stack([brute_mass(own, number, 2) for number in range(3)]).sum(0)
    some = {number: own_texts.lengths[number] for number in range(3)}
    pairs = strongest_channels(own.frozen, given, some, 2, 50)
    assert len(pairs) == 50
    best = total.flatten().topk(len(pairs)).values
    torch.testing.assert_close(total[pairs[:, 0], pairs[:, 1]], best, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_fewest_is_what_sorting_says(seed: int) -> None:
    """On skewed masses with zeros and ties."""
    rng = np.random.default_rng(seed)
    mass = np.exp(rng.normal(0, rng.uniform(0.1, 4), 5000)).astype(np.float32)
    mass[rng.random(5000) < 0.3] = 0
    mass[:500] = mass[0]
    ordered = np.sort(mass.astype(np.float64))[::-1].cumsum()
    blocks = torch.tensor(mass).split(1700)
    for share in (0.5, 0.9):
        expected = int(np.searchsorted(ordered, share * ordered[-1])) + 1
        assert fewest(blocks, share) == pytest.approx(expected, rel=0.005, abs=1)
    assert fewest([torch.zeros(4)], 0.9) == 0
    assert fewest([], 0.9) == 0
    assert fewest([torch.ones(1000)], 0.9) == pytest.approx(900)
    few, ratio = concentration(torch.ones(10, 10).split(3), 0.9)
    assert (few, ratio) == (pytest.approx(90), pytest.approx(100))


def centred(scores: np.ndarray) -> np.ndarray:
    """Rows of a lower triangle less their means."""
    return np.concatenate([row[: t + 1] - row[: t + 1].mean() for t, row in enumerate(scores)])


def test_r2_is_that_of_the_feature_feature_block() -> None:
    """Against `resolve`'s block and the model's own scores, row by row, document by document."""
    own = layer("gpt2")
    found = fits(
        own.frozen, 1, {FEATURES: carried_part(own.codes(FEATURES))}, real_entries(own.frozen, own_lengths(own))
    )
    for number, length in enumerate(own.sets.measured.lengths):
        tokens = own.sets.measured.tokens[number, :length]
        block = centred(resolve(own.model, own.sae, tokens, 1, 1).blocks()["feature", "feature"].double().numpy())
        truth = true_scores(own, number, 1)
        assert found[FEATURES].total[number] == pytest.approx((truth**2).sum(), rel=1e-4)
        explained = (truth**2).sum() - ((truth - block) ** 2).sum()
        assert found[FEATURES].explained[number] == pytest.approx(explained, rel=1e-3)
        assert found[FEATURES].explained_at_best[number] == pytest.approx(at_best(truth, block), rel=1e-3, abs=1e-4)


def own_lengths(own: CarriedLayer) -> tuple[int, ...]:
    return own.sets.measured.lengths


def true_scores(own: CarriedLayer, number: int, head: int) -> np.ndarray:
    """The model's scores on one measured document run alone, rows centred."""
    tokens = own.sets.measured.tokens[number, : own_lengths(own)[number]]
    _, cache = own.model.run_with_cache(tokens[None])
    return centred(cache["blocks.1.attn.hook_attn_scores"][0, head].double().numpy())


def at_best(truth: np.ndarray, block: np.ndarray) -> float:
    """What a block explains of the truth under its own best slope."""
    return float((truth @ block) ** 2 / (block @ block))


def block_of(own: CarriedLayer, head: int, part: torch.Tensor) -> np.ndarray:
    """Centred scores of a part of one document's activations [n, d_model] that stands at query and key (no rotary)."""
    W_q, W_k = (W.double().numpy() for W in (own.frozen.W_q[head], own.frozen.W_k[head]))
    x = part.double().numpy()
    return centred(own.frozen.scale * (x @ W_q) @ (x @ W_k).T)


def test_each_document_counts_for_itself_and_as_much_as_there_is_to_carry() -> None:
    """Q02 and Q14, every condition, by document: each against one document run alone, of unequal lengths, with its own
    mask. Weights are the documents' own squared scores, so that the effect is the R2 over all of them.
    """
    own, head, kept = layer("gpt2"), 1, 0.5
    assert len(set(own_lengths(own))) == 3
    found, cut = carrying(own)["L1H1"], truncation(own, Truncation(kept=kept), -9.0)["L1H1"]
    k, given = round(kept * own.mean_l0), own.codes(FEATURES)
    assert cut.detail["k"] == k
    parts = {
        "features": carried_part(given),
        "shuffled": carried_part(own.codes(SHUFFLED)),
        "kept": carried_part(given, strongest(given) < k),
        "random": carried_part(given, rank_within_position(given, chances(own)) < k),
    }
    sums: dict[str, list[float]] = {"R2": [], "over random atoms": [], "over shuffled decoder": []}
    sums |= {"loss of R2": [], "over random k": [], "total": []}
    for number, length in enumerate(own_lengths(own)):
        truth = true_scores(own, number, head)
        drawn, atoms = own.in_atoms(number), own.atoms(number)
        in_atoms = torch.zeros(length, models.D_MODEL).index_add_(
            0, drawn.pos, drawn.value[:, None] * atoms[drawn.feature]
        )
        block = {name: block_of(own, head, part[number, :length]) for name, part in parts.items()}
        explained = {name: float(2 * truth @ b - b @ b) for name, b in block.items()}
        sums["total"].append(float(truth @ truth))
        sums["R2"].append(explained["features"])
        sums["over random atoms"].append(explained["features"] - at_best(truth, block_of(own, head, in_atoms)))
        sums["over shuffled decoder"].append(explained["features"] - at_best(truth, block["shuffled"]))
        sums["loss of R2"].append(explained["features"] - explained["kept"])
        sums["over random k"].append(explained["kept"] - at_best(truth, block["random"]))
    total = sums.pop("total")
    assert max(total) > 1.2 * min(total), "or this sample could not tell a mean of ratios from a ratio of means"
    measured = {**found.sums, **cut.sums}
    assert measured.keys() == sums.keys()
    for name, values in sums.items():
        np.testing.assert_allclose(measured[name], values, rtol=2e-3, atol=2e-3 * np.abs(values).max(), err_msg=name)
        np.testing.assert_allclose((found.counts | cut.counts)[name], total, rtol=1e-3)


def test_every_dictionary_is_exactly_additive(any_layer: CarriedLayer) -> None:
    """Features, bias and error sum to the activation, also where nothing was learnt of a token."""
    for name in (FEATURES, TOKENS, SHUFFLED):
        own = any_layer.codes(name)
        torch.testing.assert_close(carried_part(own) + own.bias + own.error, any_layer.frozen.x, atol=2e-5, rtol=1e-4)
        assert bool((own.row[1:] >= own.row[:-1]).all())


def test_every_document_has_a_draw_of_its_own(any_layer: CarriedLayer) -> None:
    """Random atoms, shuffled directions and what is kept at random: another for every document, the same for a seed,
    of equal number and L0.
    """
    own, given, shuffled = any_layer, any_layer.codes(FEATURES), any_layer.codes(SHUFFLED)
    again = CarriedLayer(own.model, own.sae, own.sets, 1, own.hook_name, seed_parts=own.seed_parts[:-1])
    pos = given.shape[1]
    exchanged = []
    for number, length in enumerate(own_lengths(own)[:3]):
        atoms, drawn = own.atoms(number), own.in_atoms(number)
        assert torch.equal(atoms, again.atoms(number))
        assert not torch.equal(atoms, own.atoms(number + 1))
        torch.testing.assert_close(atoms.norm(dim=-1), torch.ones(len(given.decoder)))
        here = given.row // pos == number
        l0 = torch.bincount(given.row[here] % pos, minlength=pos)[:length]
        found = torch.bincount(drawn.pos, minlength=length)
        assert bool((found <= l0).all()) and float(found.sum()) > 0.8 * float(l0.sum())
        assert bool((drawn.value > 0).all())
        pairs = {}
        for code, row in ((given, 0), (shuffled, 1)):
            at = code.row == number * pos + row * 0
            pairs[row] = dict(zip(code.value[at].tolist(), code.feature[at].tolist(), strict=True))
        assert pairs[0].keys() == pairs[1].keys(), "the values stay"
        exchanged.append({feature: pairs[1][value] for value, feature in pairs[0].items()})
    assert {f for e in exchanged for f in e.values()} <= set(given.feature.tolist()), "directions of live features"
    both = exchanged[0].keys() & exchanged[1].keys()
    assert any(exchanged[0][f] != exchanged[1][f] for f in both), "one shuffle for all documents"
    drawn = chances(own).split(torch.bincount(given.row // pos).tolist())
    assert not torch.equal(drawn[0][:20], drawn[1][:20])
    assert torch.equal(chances(own), chances(again))


@pytest.mark.parametrize("control", ["random atoms", "shuffled decoder"])
def test_the_standard_error_covers_the_scatter_over_draws(control: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lead over a control under other seeds scatters as its standard error says where documents differ in nothing
    but the draw; one draw for all of them would scatter as much and show no error at all.
    """
    whole = layer("gpt2")
    ids = whole.sets.measured.tokens[0].tolist()
    own = with_measured(whole, texts([(f"s{k}", ids) for k in range(24)], 20))  # nothing else can differ

    def leads() -> tuple[float, float]:
        """(scatter over seeds, mean standard error) of the lead, root mean squares over the heads."""
        effect, se = [], []
        for seed in range(8):
            other = CarriedLayer(own.model, own.sae, own.sets, 1, own.hook_name, seed_parts=("seed", str(seed)))
            other.__dict__ |= {"frozen": own.frozen, "selection": whole.selection, "estimation": whole.estimation}
            other._codes[FEATURES] = own.codes(FEATURES)
            name = f"over {control}"
            means = [ClusterMeans(m.sums[name], m.counts[name], seed=1) for m in carrying(other).values()]
            effect.append(
                [float(m.sums.sum() / m.counts.sum()) for m in means]
            )  # a sample without a spread has no estimate
            se.append([float(np.nan_to_num(m.se[0])) for m in means])
        return float(np.sqrt(np.var(effect, axis=0, ddof=1).mean())), float(np.sqrt(np.square(se).mean()))

    scatter, error = leads()
    assert 0.6 * error < scatter < 1.5 * error
    drawn = CarriedLayer.generator
    monkeypatch.setattr(CarriedLayer, "generator", lambda self, *what: drawn(self, what[0]))
    scatter, error = leads()
    assert scatter > 10 * error, "or this sample could not tell"


def with_measured(own: CarriedLayer, measured: Texts) -> CarriedLayer:
    """The same layer, dictionary and seeds, with other measured documents."""
    other = Sets(measured, own.sets.selection, own.sets.estimation)
    return CarriedLayer(own.model, own.sae, other, 1, own.hook_name, seed_parts=own.seed_parts[:-1])


def test_what_is_selected_never_sees_what_is_measured() -> None:
    """With the measured documents exchanged for others, Q14's k, Q15's channels and the token dictionary of Q02 and Q03
    are the same to the last bit.
    """
    whole = layer("gpt2")
    sae = models.tiny_sae(whole.hook_name, "standard")  # L0 varies from text to text
    own = CarriedLayer(whole.model, sae, whole.sets, 1, whole.hook_name, seed_parts=("t",))
    rng = np.random.default_rng(11)
    strange = [(f"o{k}", [0, *rng.integers(200, models.D_VOCAB, 10 + k).tolist()]) for k in range(6)]
    other = with_measured(own, texts(strange, 20))
    assert other.mean_l0 == own.mean_l0
    seen = [len(each.codes(FEATURES).row) / each.frozen.sigma.numel() for each in (own, other)]
    assert seen[0] != seen[1], "or this dictionary could not tell"
    everyone = [
        (content(each, StrongestChannels(channels=30, selected_on=4), 0.0), truncation(each, Truncation(), 0.0))
        for each in (own, other)
    ]
    for head in everyone[0][0]:
        channels = [found[head].detail["strongest channels"] for found, _ in everyone]
        assert channels[0] == channels[1] and len(channels[0]) == 30
        assert everyone[0][1][head].detail["k"] == everyone[1][1][head].detail["k"]
        assert not np.array_equal(
            everyone[0][0][head].counts["mass off BOS"], everyone[1][0][head].counts["mass off BOS"]
        )
    for name in ("current", "previous", "mean", "first"):
        assert torch.equal(getattr(own.token_dictionary, name), getattr(other.token_dictionary, name))


def test_a_document_is_measured_alike_whatever_stands_beside_it() -> None:
    """What Q02, Q03, Q14 and Q15 find on the first measured documents does not depend on the later ones (but for which
    features are live at all, among which the shuffle exchanges).
    """
    own = layer("gpt2")
    fewer = with_measured(own, own.sets.measured.first(5))
    spread = (Concentration(documents=8), Concentration(documents=5))
    for measure in (
        lambda each, k: carrying(each),
        lambda each, k: truncation(each, Truncation(), 0.0),
        lambda each, k: sparsity(each, spread[k]),
        lambda each, k: content(each, StrongestChannels(channels=30, selected_on=4), 0.0),
    ):
        many, few = measure(own, 0), measure(fewer, 1)
        for head, found in few.items():
            for name, values in found.sums.items():
                if name != "over shuffled decoder":
                    np.testing.assert_allclose(many[head].sums[name][:5], values, rtol=1e-4, atol=1e-5, err_msg=name)
                    np.testing.assert_allclose(many[head].counts[name][:5], found.counts[name], rtol=1e-4)
            assert list(many[head].sources[:5]) == list(found.sources)


def test_the_mass_of_a_document_is_its_weight() -> None:
    """Q15: sums and weights are masses of whole terms, so that the effect is the share of all mass, not a mean of
    shares.
    """
    own, head = layer("gpt2"), 3
    found = content(own, StrongestChannels(channels=30, selected_on=4), 0.0)["L1H3"]
    pairs = [tuple(map(int, name.split(" -> "))) for name in found.detail["strongest channels"]]
    weight = found.counts["mass off BOS"]
    assert weight.max() > 1.2 * weight.min(), "or this sample could not tell"
    for number in range(3):
        every = brute_mass(own, number, head)
        assert weight[number] == pytest.approx(sum(float(every[i, j]) for i, j in pairs), rel=1e-3)
    assert bool((found.sums["mass off BOS"] <= weight).all())
    np.testing.assert_allclose(found.counts["drawn off BOS"], weight / 2)


def test_sparsity_is_that_of_whole_terms() -> None:
    """Q03 by document: shares of features from whole terms, sorted, and against the document's own random atoms."""
    own, head = layer("gpt2"), 2
    found = sparsity(own, Concentration(documents=4))["L1H2"]
    chosen = [own.sets.measured.sources.index(source) for source in found.sources]
    assert len(set(chosen)) == 4
    for place, number in enumerate(chosen):
        length = own_lengths(own)[number]
        doc = numbered(own.in_atoms(number), number, length)
        tables = brute_mass(own, number, head), masses(own.frozen, own.atoms(number), doc, head)
        tokens = own.sets.measured.tokens[number, :length]
        live = len(resolve(own.model, own.sae, tokens, 1, head).channels(reduce="count"))
        few, ratio = [], []
        for table, n in zip(tables, (live, live_channels(own.frozen, doc)), strict=True):
            ordered = np.sort(table.double().numpy().ravel())[::-1]
            few.append((np.searchsorted(ordered.cumsum(), 0.9 * ordered.sum()) + 1) / n)
            ratio.append(ordered.sum() ** 2 / (ordered**2).sum() / n)
        expected = {
            "share of live channels": few[0],
            "participation ratio": ratio[0],
            "share against random atoms": np.log(few[0] / few[1]),
            "participation against random atoms": np.log(ratio[0] / ratio[1]),
        }
        for name, value in expected.items():
            assert found.sums[name][place] == pytest.approx(value, rel=0.02, abs=0.01), name


def test_the_strongest_of_a_position_are_kept() -> None:
    """Ranks, against sorting each position by the length of what a feature adds."""
    own = layer("gpt2").codes(FEATURES)
    rank = strongest(own)
    for row in (0, 7, 33):
        here = own.row == row
        length = (own.value[here, None] * own.decoder[own.feature[here]]).norm(dim=-1)
        assert rank[here].tolist() == length.argsort(descending=True).argsort().tolist()


def test_token_directions_are_the_planted_ones() -> None:
    """x = mean + current + previous + noise: directions come back, rare tokens shrink, padding and measured text do
    not matter.
    """
    generator = torch.Generator().manual_seed(0)
    n_vocab, width = 12, 6
    tokens = torch.randint(0, n_vocab, (150, 24), generator=generator)
    current, previous = (torch.randn(n_vocab, width, generator=generator) for _ in range(2))
    mean = torch.randn(width, generator=generator)
    x = mean + current[tokens] + 0.01 * torch.randn(150, 24, width, generator=generator)
    x[:, 1:] += previous[tokens[:, :-1]]
    x[:, 0] = 50.0  # a sink must not colour any token
    lengths = [24 - k % 5 for k in range(150)]
    dictionary = learn(x, tokens, lengths)
    new = torch.randint(0, n_vocab, (4, 24), generator=generator)
    truth = mean + current[new]
    truth[:, 1:] += previous[new[:, :-1]]
    told = dictionary.predict(new)
    assert float((told - truth)[:, 1:].abs().max()) < 0.05
    assert bool((told[:, 0] == 50).all())
    padded = x.clone()
    padded[4, 20:] = 1e6
    assert lengths[4] == 20
    torch.testing.assert_close(learn(padded, tokens, lengths).current, dictionary.current)
    unseen = dictionary.codes(x[:2], torch.full((2, 24), 99))
    assert set(unseen.row.tolist()) == {0, 24}, "tokens that were never seen have no entry"
    with pytest.raises(FraError, match="documents of two tokens"):
        learn(x[:0], tokens[:0], [1])


def test_shrinkage_predicts_other_values_best() -> None:
    """The factor is close to the best one, which is known for a planted spread between and within groups."""
    rng = np.random.default_rng(0)
    count = np.repeat([1, 3, 30], 400)
    group = rng.normal(0, 1.5, len(count))
    sums = [rng.normal(b, 2.0, n) for b, n in zip(group, count, strict=True)]
    square = torch.tensor(sum(float((s**2).sum()) for s in sums))
    mean = torch.tensor([s.mean() for s in sums])[:, None]
    found = shrinkage(torch.tensor(count, dtype=torch.float64), mean, square)
    for n in (1, 3, 30):
        assert float(found[count == n][0]) == pytest.approx(n * 2.25 / (n * 2.25 + 4.0), abs=0.04)
    alone = shrinkage(torch.ones(3), torch.ones(3, 1), torch.tensor(3.0))
    assert alone.tolist() == [0, 0, 0], "one value a group says nothing of what is noise"


def claim(**changed: object) -> Claim:
    """A claim with the conditions of Q03 or whatever is asked for."""
    base = {"id": "T", "title": "t", "h0": "h", "bar": 0.5, "statistic": "t/1", "stimuli": ("natural",)}
    return Claim(**(base | {"n": 60, "min_sources": 4} | changed))  # type: ignore[arg-type]


def test_paired_conditions_look_the_right_way() -> None:
    """A planted sample, with one condition above its bar and one below: the judge agrees, and a broken one turns it."""
    rng = np.random.default_rng(1)
    c = claim(above=False, condition="small", bars={"lead": 0.2})
    n = sources_for(c.level, 2)  # either condition can refute
    sums = {"small": rng.normal(0.1, 0.05, n), "lead": rng.normal(0.6, 0.1, n)}

    def outcome(samples: dict[str, np.ndarray]) -> Outcome:
        measured = ByDocument(samples, {name: np.ones(n) for name in samples}, [str(k) for k in range(n)])
        found = paired_evidence(c, "t", ["L0H0", "L1H0"], {"L0H0": measured})
        assert judge(c, found["L1H0"]).outcome is Outcome.CANNOT_RUN
        shown = found["L0H0"].candidates["every condition"][0]
        assert shown.low < shown.effect < shown.high
        assert shown.effect == pytest.approx(samples["small"].mean())
        return judge(c, found["L0H0"]).outcome

    assert outcome(sums) is Outcome.SUPPORTED
    assert outcome(sums | {"lead": sums["lead"] - 0.6}) is Outcome.REFUTED
    assert outcome(sums | {"small": sums["small"] + 0.8}) is Outcome.REFUTED
    assert outcome(sums | {"lead": sums["lead"] - 0.4}) is Outcome.INCONCLUSIVE


def test_q_is_of_p_values_that_are_not_yet_adjusted() -> None:
    """Heads that are equally far above the bar: Holm multiplies by their number, Benjamini-Hochberg leaves p alone."""
    c, rng = claim(bar=0.0, condition="lead"), np.random.default_rng(2)
    names, sample = [str(k) for k in range(30)], rng.normal(0.35, 1.0, 30)
    heads = {f"L0H{h}": ByDocument({"lead": rng.permutation(sample)}, {"lead": np.ones(30)}, names) for h in range(4)}
    found = paired_evidence(c, "t", list(heads), heads)
    raw = []
    for h, m in heads.items():
        means = ClusterMeans(m.sums["lead"], seed=seed_of(c.digest, "t", h, "lead"))
        raw.append(means.p_above(0.0, simultaneous=False)[0])
    expected = sps.false_discovery_control(raw)
    np.testing.assert_allclose([found[h].q for h in heads], expected, atol=0.02)
    assert 0.02 < max(expected) < 2 * min(raw), "or this sample could not tell the two apart"


def test_a_dictionary_of_random_atoms_is_no_better_than_random_atoms() -> None:
    """Features that are random atoms themselves: neither carrying nor sparsity is supported."""
    own = layer("gpt2", 72)
    arm = Arm(own.frozen, own.codes(FEATURES))
    atoms = draw_atoms(models.D_SAE, torch.Generator().manual_seed(5), own.frozen.x)
    own._codes[FEATURES] = random_atoms(arm, atoms).codes
    c = declared("Q02", bar=-1.0, bars=declared("Q02").bars | {"over shuffled decoder": -9.0})
    for found in paired_evidence(c, "t", [], carrying(own)).values():
        assert judge(c, found).outcome is not Outcome.SUPPORTED
    bars = declared("Q03").bars | {"participation ratio": 2.0}
    c = declared("Q03", bar=2.0, bars=bars)
    for found in paired_evidence(c, "t", [], sparsity(own, Concentration())).values():
        assert judge(c, found).outcome is not Outcome.SUPPORTED
        against = {x.name: x for x in found.candidates["every condition"]}["share against random atoms"]
        assert abs(against.effect) < 0.15


@pytest.fixture(scope="module")
def wired() -> CarriedLayer:
    """The hand-built circuit, whose dictionary is its coordinates."""
    rng = np.random.default_rng(5)
    made = []
    for k in range(24):
        half = rng.permutation(64)[:16].tolist()
        made.append((f"s{k}", [circuit.BOS, *half, *half]))
    own = Sets(*(texts(made[k::3], 33) for k in range(3)))
    return CarriedLayer(circuit.model(), circuit.dictionary(), own, 1, circuit.HOOK, seed_parts=("circuit",))


def test_the_circuit_is_carried_by_its_features(wired: CarriedLayer) -> None:
    """L1H0: nearly all of the scores from features, none from shuffled directions; the strongest two of a position are
    not the ones that it reads; its channels are (token, previous token) and attend to content.
    """
    found = carrying(wired)["L1H0"]
    r2 = float(found.sums["R2"].sum() / found.counts["R2"].sum())
    assert r2 > 0.97
    assert found.detail[f"R2 of {SHUFFLED} (best slope)"] < 0.1
    cut = truncation(wired, Truncation(), 0.5)["L1H0"].detail
    assert (cut["k"], cut["R2 of all features"]) == (2, pytest.approx(r2, abs=1e-4))
    assert cut["R2(k)"][2] == pytest.approx(0.0, abs=1e-3), "token and position are kept, the previous token is not"
    assert 0.1 < cut["R2 of random k"] < 0.6, "one of three pairs of features is the right one, on either side"
    sparse = sparsity(wired, Concentration())["L1H0"].detail[FEATURES]
    doc = document(wired.codes(FEATURES), 0, 33)
    held = masses(wired.frozen, wired.codes(FEATURES).decoder, doc, 0)
    i, j = torch.nonzero(held > 1e-3 * held.max(), as_tuple=True)
    assert bool((doc.live[j] - circuit.PREVIOUS == doc.live[i]).all())
    assert sparse["share"] < 0.02
    off = content(wired, StrongestChannels(), 1.1)["L1H0"]
    assert off.undecided is not None
    shown = off.detail["strongest channel on a document"]
    i, j = map(int, shown["channel"].split(" -> "))
    assert j == circuit.PREVIOUS + i
    assert shown["query tokens"][0].startswith(f"'{i}' x")
    assert content(wired, StrongestChannels(), 0.0)["L1H0"].undecided is None
    assert off.sums["mass off BOS"].sum() / off.counts["mass off BOS"].sum() > 0.9


def test_sets_are_disjoint_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No source in two sets; one document of each measured source; equal names give equal sets; the design says how
    many; too little text is refused.
    """
    from fra.targets.target import load_target

    target = load_target("mini")
    parts = document_sets(target)
    rows = [
        {tuple(row) for row in part.tokens.tolist()} for part in (parts.measured, parts.selection, parts.estimation)
    ]
    assert [len(r) for r in rows] == [120, 40, 120]
    sources = [set(part.sources) for part in (parts.measured, parts.selection, parts.estimation)]
    assert not (sources[0] & sources[1] or sources[0] & sources[2] or sources[1] & sources[2])
    assert len(sources[0]) == 120
    few = document_sets(target, NaturalSets(measured=30, longest=50))
    assert (len(few.measured), few.measured.tokens.shape[1]) == (30, 50)
    assert torch.equal(document_sets(target).selection.tokens, parts.selection.tokens)
    seven = target.documents()[:7]
    monkeypatch.setattr(target, "documents", lambda: seven)
    with pytest.raises(FraError, match="7 documents where 8"):
        document_sets(target)


def test_padding_changes_nothing() -> None:
    """A document measured beside longer ones has the masses that it has alone."""
    own = layer("gpt2")
    given, n = own.codes(FEATURES), own.sets.measured.lengths[1]
    alone: FrozenLayer = freeze(own.model, own.sets.measured.tokens[1:2, :n], 1, own.hook_name)
    alone_codes = codes(own.sae, alone.x)
    beside = masses(own.frozen, given.decoder, document(given, 1, n), 0)
    torch.testing.assert_close(
        beside, masses(alone, alone_codes.decoder, document(alone_codes, 0, n), 0), atol=1e-6, rtol=1e-4
    )
