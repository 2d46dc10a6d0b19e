"""The statistics of D01, D04, D05, D06, D16 and D18 on dictionaries whose answer is known by construction."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats as sps

import fra
from fra.attribution.head_outputs import HeadOutputs, Live, observe, padded
from fra.attribution.raised_tokens import raised_tokens
from fra.claim import Claim, Condition, Outcome, judge
from fra.dictionaries.blockdiag import BlockDiagonalSAE, BlockDiagonalSAEConfig
from fra.dictionaries.encoder import Encoder
from fra.measures.head_outputs import corpus as head_output_corpus
from fra.measures.head_outputs import d01_quality, d04_d06_heads, d05_sources, d16_groups, d18_width
from fra.measures.head_outputs.corpus import CorpusFirings, HalvedCorpus
from fra.stimuli import repeated
from fra.stimuli import sets as document_sets
from fra.stimuli.designs import RepeatedSets
from fra.stimuli.repeated import Batch
from fra.tests.claims import claim
from fra.tests.models import ARCHITECTURES, D_MODEL, build_sae, model_folder, random_tokens, tiny, tiny_sae
from fra.tests.tiny_targets import signed_axes, write_target, write_text
from fra.verdicts.decide import Number
from fra.verdicts.pooled import ByDictionary, clustered, clustered_or_number, evidence

Z = "blocks.1.attn.hook_z"
N_HEADS, D_HEAD = 4, 8


def made_up(blocks: torch.Tensor, n_docs: int = 24, n_pos: int = 30, seed: int = 0) -> CorpusFirings:
    """Firings of a ReLU dictionary with encoder blocks [n_heads, d_head, d_sae] on random values and patterns."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(n_docs, n_pos, N_HEADS, D_HEAD, generator=g, dtype=torch.float64)
    scores = 3 * torch.randn(n_docs, N_HEADS, n_pos, n_pos, generator=g, dtype=torch.float64)
    pattern = scores.masked_fill(torch.ones(n_pos, n_pos).triu(1).bool(), -torch.inf).softmax(-1)
    z = torch.einsum("bhqk,bkhd->bqhd", pattern, values)
    bias = torch.full((blocks.shape[2],), -1.0, dtype=torch.float64)
    pre = torch.einsum("bthd,hdf->btf", z, blocks) + bias
    doc, pos, feature = (pre > 0).nonzero(as_tuple=True)
    live = Live(doc, pos, feature, pre[doc, pos, feature])
    real = torch.ones(n_docs, n_pos, dtype=torch.bool)
    outputs = HeadOutputs(Encoder(Z, 1, blocks, bias, "none"), z, values, pattern, real.to(z), real, live)
    tokens = torch.randint(1, 200, (n_docs, n_pos), generator=g)
    order = np.arange(n_docs)
    corpus = HalvedCorpus(tokens, real, tuple(f"s{k}" for k in order[1::2]), order[::2], order[1::2], list(tokens))
    return CorpusFirings(corpus, outputs, live.where(live.pos > 0))


def blocks_of(heads: list[int], seed: int = 1, size: float = 3.0) -> torch.Tensor:
    """Features that each read some one head, strongly; a fifth of that everywhere else."""
    g = torch.Generator().manual_seed(seed)
    blocks = 0.2 * size * torch.randn(N_HEADS, D_HEAD, len(heads), generator=g, dtype=torch.float64) / D_HEAD**0.5
    for feature, head in enumerate(heads):
        blocks[head, :, feature] *= 5
    return blocks


def test_shuffled_blocks_keep_norms_and_leave_no_block_in_place() -> None:
    weight = torch.randn(N_HEADS, D_HEAD, 50, dtype=torch.float64)
    shuffled = head_output_corpus.shuffle_blocks(weight, 3)
    torch.testing.assert_close(shuffled.norm(dim=1), weight.norm(dim=1))
    unit, own = (torch.nn.functional.normalize(x, dim=1) for x in (shuffled, weight))
    match = torch.einsum("hdf,gdf->fhg", unit, own) > 1 - 1e-9
    assert bool((match.sum(2) == 1).all()) and not bool(match.diagonal(dim1=1, dim2=2).any())
    assert torch.equal(head_output_corpus.shuffle_blocks(weight, 3), shuffled)


def test_squares_and_shares_by_hand() -> None:
    firings = made_up(blocks_of([0, 1, 2, 3, 0, 1]))
    documents = firings.corpus.discovery
    squares = firings.squares(documents)
    by_head = firings.outputs.by_head(torch.arange(6))
    expected = torch.zeros_like(squares)
    for doc, pos, feature in zip(
        firings.live.doc.tolist(), firings.live.pos.tolist(), firings.live.feature.tolist(), strict=True
    ):
        if doc in documents:
            expected[list(documents).index(doc), feature] += by_head[doc, pos, :, feature] ** 2
    torch.testing.assert_close(squares, expected)
    division = d04_d06_heads.divide(firings, d04_d06_heads.alive_features(firings))
    assert division.top.tolist() == [0, 1, 2, 3, 0, 1]
    torch.testing.assert_close(division.share, expected.sum(0) / expected.sum((0, 2))[:, None])
    sums, counts = d04_d06_heads.top_share(firings, division)
    assert float(sums.sum() / counts.sum()) > 0.8


def test_control_features_fire_as_densely_where_they_are_largest() -> None:
    firings = made_up(blocks_of([0, 1, 2, 3, 0, 1]))
    control = firings.shuffled(0)
    o = control.outputs
    pre = o.pre_activation(torch.arange(6))
    fires = [torch.zeros(24, 30, 6, dtype=torch.bool) for _ in range(2)]
    for mark, each in zip(fires, (firings, control), strict=True):
        mark[each.live.doc, each.live.pos, each.live.feature] = True
    assert torch.equal(fires[0].sum(2), fires[1].sum(2)) and not torch.equal(*fires)
    kept, left = (pre.masked_fill(~m, f) for m, f in ((fires[1], torch.inf), (~fires[1], -torch.inf)))
    assert bool((kept.min(2).values >= left.max(2).values).all())
    torch.testing.assert_close(control.live.value, pre[control.live.doc, control.live.pos, control.live.feature])


def test_spread_features_that_move_the_same_tokens_agree() -> None:
    heads = blocks_of([0] * 6, size=2.0)
    heads[1] = heads[0]
    heads[:, :, 3:] *= 1.01
    firings = made_up(heads)
    o = firings.outputs
    alike = o.pattern.clone()
    alike[:, 1] = alike[:, 0]
    values = o.values.clone()
    values[:, :, 1] = values[:, :, 0]
    same = CorpusFirings(
        firings.corpus, HeadOutputs(o.encoder, o.z, values, alike, o.gain, o.real, o.live), firings.live
    )
    for each, low, high in ((same, 0.999, 1.0), (firings, 0.0, 0.6)):
        share = torch.tensor([[0.45, 0.44, 0.06, 0.05]] * 6, dtype=torch.float64)
        division = d04_d06_heads.Division(torch.arange(6), share, torch.ones(6, dtype=torch.float64))
        (sums, counts), n = d04_d06_heads.agreement(each, division)
        assert n == 6 and low <= sums.sum() / counts.sum() <= high
        assert counts.sum() == pytest.approx(6)
    dominated = d04_d06_heads.Division(torch.arange(6), torch.eye(4)[[0] * 6].double(), torch.ones(6).double())
    assert d04_d06_heads.agreement(firings, dominated)[1] == 0


def test_rank_correlations_are_scipys() -> None:
    a, b = torch.randn(20, 8), torch.randn(20, 8)
    expected = [sps.spearmanr(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(d04_d06_heads.rank_correlations(a, b).numpy(), expected, atol=1e-12)
    a[:, 2:], b[:, [0, 1, 3, 4, 5, 6]] = 0, 0  # a block-diagonal dictionary has one head, or few
    expected = [sps.spearmanr(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(d04_d06_heads.rank_correlations(a, b).numpy(), expected, atol=1e-12)
    assert not bool(d04_d06_heads.rank_correlations(torch.zeros(3, 8), b[:3]).any())


def test_pairs_that_fire_together_are_counted_as_by_hand() -> None:
    live = (torch.rand(3, 11, 9) < 0.4).double()
    groups = torch.tensor([[0, 1, 2, 3], [4, 8, 6, 5]])
    both, either = d16_groups.together(live, groups)
    for number, group in enumerate(groups.tolist()):
        for doc in range(3):
            pairs = [(i, j) for k, i in enumerate(group) for j in group[k + 1 :]]
            assert both[number, doc] == sum(int((live[doc, :, i] * live[doc, :, j]).sum()) for i, j in pairs)
            union = sum(int(((live[doc, :, i] + live[doc, :, j]) > 0).sum()) for i, j in pairs)
            assert either[number, doc] == union
    decoder = torch.randn(9, 5)
    unit = decoder / decoder.norm(dim=1, keepdim=True)
    expected = [
        np.mean([float(unit[i] @ unit[j]) for k, i in enumerate(g) for j in g[k + 1 :]]) for g in groups.tolist()
    ]
    np.testing.assert_allclose(d16_groups.cosines(decoder, groups), expected, rtol=1e-5)


def test_controls_of_a_group_belong_to_other_heads_and_fire_about_as_often() -> None:
    g = torch.Generator().manual_seed(0)
    share = torch.rand(200, N_HEADS, generator=g)
    share = share / share.sum(1, keepdim=True)
    division = d04_d06_heads.Division(torch.arange(200), share, torch.ones(200))
    count = torch.arange(1, 201) ** 2
    own = d16_groups.own_features(division, 2)
    assert bool((share[own, 2] >= share[:, 2].sort().values[-10]).all())
    drawn, again = d16_groups.random_heads(division, own, 2, count, np.random.default_rng(0), 2)
    assert not torch.equal(drawn, again)
    assert len(drawn) == 10 == len(set(drawn.tolist()))
    assert bool((division.top[drawn] != 2).all())
    assert float((count[drawn].log() - count[own].log()).abs().median()) < 0.5


def test_sources_of_a_firing_by_hand() -> None:
    firings = made_up(blocks_of([0, 1, 2]), n_docs=4, n_pos=12)
    o = firings.outputs
    tokens = torch.randint(0, 4, (4, 12))
    own = torch.tensor([1, 2, 3])
    found = d05_sources.sources(o, tokens, firings.live, own[firings.live.feature], 1)
    every = o.by_source(torch.arange(3), 1)
    for k in range(0, len(firings.live), 5):
        doc, t, f = (int(x[k]) for x in (firings.live.doc, firings.live.pos, firings.live.feature))
        c = every[doc, t, : t + 1, f] ** 2
        seen = tokens[doc, : t + 1]
        share = {token: float(c[seen == token].sum() / c.sum()) for token in range(4)}
        mine = int(own[f])
        assert float(found.attribution[k]) == pytest.approx(share[mine], abs=1e-9)
        assert float(found.attention[k]) == pytest.approx(
            float(o.pattern[doc, 1, t, : t + 1][seen == mine].sum()), abs=1e-9
        )
        assert float(found.frequency[k]) == pytest.approx(float((seen == mine).double().mean()), abs=1e-6)
        others = [share[int(token)] for token in seen if int(token) != mine]
        assert float(found.another[k]) == pytest.approx(float(np.mean(others)) if others else 0.0, abs=1e-9)


def test_the_rise_is_the_slope_of_the_quarters() -> None:
    rng = np.random.default_rng(0)
    quarter, doc = rng.integers(0, 4, 400), rng.integers(0, 12, 400)
    share = 0.2 + 0.1 * quarter + 0.01 * rng.normal(size=400)
    values = d05_sources.rise(share, quarter, doc, 12)
    means = [share[quarter == q].mean() for q in range(4)]
    assert values.mean() == pytest.approx(3 * np.polyfit(range(4), means, 1)[0])
    assert np.isnan(d05_sources.rise(share, np.zeros(400, dtype=int), doc, 12)).all()
    before = Live(*(torch.zeros(100, dtype=torch.long) for _ in range(3)), torch.arange(100.0))
    now = Live(*(torch.zeros(4, dtype=torch.long) for _ in range(3)), torch.tensor([3.0, 30.0, 60.0, 200.0]))
    assert d05_sources.quarters(before, now, 1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_raised_token_is_what_the_models_logits_say(kind: str) -> None:
    """The feature's decoder added to hook_z with the rest of the model frozen: MLP outputs and scales held."""
    model: Any = tiny(kind, torch.float64)
    sae = tiny_sae(Z, dtype="float64", reshape_activations="hook_z")
    tokens = random_tokens(6)[None]
    with torch.no_grad():
        _, clean = model.run_with_cache(tokens)
        held = [
            (n, lambda old, hook, n=n: clean[n]) for n in model.hook_dict if n.endswith("hook_scale") and n in clean
        ]
        held += [("blocks.1.hook_mlp_out", lambda old, hook: clean["blocks.1.hook_mlp_out"])] * (
            "blocks.1.hook_mlp_out" in clean
        )
        own = raised_tokens(model, sae)
        for feature in (0, 40, 95):
            add = sae.W_dec[feature].detach()

            def put(z: torch.Tensor, hook: Any, add: torch.Tensor = add) -> torch.Tensor:
                return z + 1e-3 * add.view(z.shape[2:])

            with model.hooks(fwd_hooks=held):
                before = model(tokens)
            with model.hooks(fwd_hooks=[*held, (Z, put)]):
                after = model(tokens)
            assert int((after - before)[0, -1].argmax()) == int(own[feature])


def claim_of(**fields: Any) -> Claim:
    return Claim(
        **(
            {"id": "T01", "title": "t", "h0": "h", "bar": 0.5, "statistic": "t/1", "stimuli": ("natural",), "n": 120}
            | fields
        )
    )


def test_the_worst_dictionary_decides() -> None:
    rng = np.random.default_rng(1)
    sources = [f"s{k}" for k in range(40)]
    means = {
        name: clustered(level + 0.05 * rng.normal(size=40), np.ones(40), sources, (name,))
        for name, level in (("good", 0.9), ("bad", 0.3))
    }

    def pooled(bar: float, given: dict[str, Any], above: bool = True, conditions: int = 1) -> Condition:
        """The first of so many conditions, any of which may refute."""
        claim = claim_of(bar=bar, above=above)
        measured = [ByDictionary(f"share {k}", bar, given, above=above) for k in range(conditions)]
        return evidence(claim, measured, 40, {}).candidates["every dictionary"][0]

    both = pooled(0.5, means)
    assert both.fails(0.05) and not both.holds(0.05)
    assert both.effect == pytest.approx(0.3, abs=0.03) and both.high < 0.5
    alone = pooled(0.5, {"good": means["good"]})
    assert alone.holds(0.05) and alone.low > 0.5
    below = pooled(0.5, means, above=False)
    assert below.fails(0.05) and below.effect == pytest.approx(0.9, abs=0.03)
    fixed = clustered_or_number(24.0 * np.ones(40), np.ones(40), sources, ("L0",))
    assert fixed == Number(24.0)
    for bar, holds in ((25.0, True), (23.0, False)):
        number = pooled(bar, {"topk": fixed}, above=False, conditions=2)
        assert number.p is None and number.holds(0.05) == holds and number.fails(0.05) != holds
    mixed = pooled(0.5, {"good": means["good"], "block": Number(1.0)}, conditions=2)
    assert mixed.holds(0.05) and mixed.effect == alone.effect and mixed.low == alone.low
    assert pooled(0.5, {"good": means["good"], "block": Number(0.2)}, conditions=2).fails(0.05)
    found = evidence(claim_of(), [ByDictionary("share", 0.5, means, null=0.25)], 40, {})
    assert judge(found.claim, found).outcome == Outcome.REFUTED and found.power is not None and found.power > 0.99


def target(folder: Path, hook: Path | None, n_texts: int = 60) -> Any:
    rng = np.random.default_rng(5)
    words = ("one", "two", "three", "four", "five", "six", "seven", "said", "more", "than", "make", "and")
    texts = {f"{'abcdefghij'[k % 10]}-{k:02d}": " ".join(rng.choice(words, 60)) for k in range(n_texts)}
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


@pytest.mark.usefixtures("short_repeats")
def test_a_random_model_and_dictionary_support_nothing(tmp_path: Path) -> None:
    made = target(tmp_path, build_sae("topk", D_MODEL, Z, tmp_path / "sae", reshape_activations="hook_z"))
    few = {"n": 60, "min_documents": 20}
    found = d04_d06_heads.dominance_evidence(claim("D04", **few), claim("D04.spread", **few), made)
    found |= d04_d06_heads.norm_evidence((claim("D06", **few), claim("D06.W_O", **few)), made)
    found |= d16_groups.group_evidence(claim("D16", **few), made)
    found["D01"] = d01_quality.quality_evidence(claim("D01", **few), made)
    own = claim("D05", **few)
    found |= {f"D05 {head}": row for head, row in d05_sources.source_evidence(own, made).items()}
    outcomes = {name: judge(row.claim, row).outcome for name, row in found.items()}
    assert Outcome.SUPPORTED not in outcomes.values(), outcomes
    assert outcomes["L0H0"] == Outcome.CANNOT_RUN and outcomes["D05 L1H0"] == Outcome.NOT_APPLICABLE
    assert outcomes["D01"] == Outcome.REFUTED
    again = d04_d06_heads.dominance_evidence(claim("D04", **few), claim("D04.spread", **few), made)
    assert again["D04"].candidates == found["D04"].candidates


def test_a_dictionary_that_is_right_by_construction_is_good_enough(tmp_path: Path) -> None:
    axes = signed_axes(tmp_path / "sae", Z, k=28, reshape_activations="hook_z")
    made = target(tmp_path, axes)
    bars = {
        "loss recovered (mean)": 0.9,
        "over PCA of equal L0": -0.1,
        "over an untrained dictionary": 0.1,
        "L0 over width": 0.95,
    }
    found = d01_quality.quality_evidence(claim_of(bar=0.9, bars=bars, n=60), made)
    conditions = {c.name: c for c in found.candidates["every dictionary"]}
    assert conditions["loss recovered (zero)"].effect > 0.95, found.detail
    assert conditions["over an untrained dictionary"].holds(0.05)
    numbers = found.detail["numbers"][Z]
    assert numbers["L0"] <= 28 and conditions["L0 over width"].finite and numbers["explained variance"][0] > 0.9
    low, own, high = numbers["never fires"][1], numbers["never fires"][0], numbers["never fires"][2]
    assert 0 <= low <= own <= high <= 1


@pytest.mark.usefixtures("short_repeats")
def test_only_what_the_first_copy_foretells_counts_on_repeated_text(tmp_path: Path) -> None:
    made = target(tmp_path, build_sae("topk", D_MODEL, Z, tmp_path / "sae", reshape_activations="hook_z"))
    corpus = head_output_corpus.repeated_corpus(made)
    assert len(corpus.discovery) == len(corpus.measured) == 40 == len(corpus.sources)
    for tokens, real, document in zip(corpus.tokens, corpus.real, corpus.documents, strict=True):
        period = (len(document) - 1) // 2
        assert torch.equal(tokens[: len(document)], document)
        counted = torch.nonzero(real)[:, 0]
        assert counted.tolist() == list(range(period + 2, 2 * period + 1))
        assert all(int(tokens[t - 1]) == int(tokens[t - 1 - period]) for t in counted.tolist())
    bars = dict.fromkeys(d01_quality.CONDITIONS, 0.1)
    own = claim_of(bar=0.9, bars=bars, stimuli=("repeated_natural",))
    found = d01_quality.quality_evidence(own, made)
    assert found.n == 40 and len(found.candidates["every dictionary"]) == 5


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


@pytest.mark.usefixtures("short_repeats")
def test_two_widths_are_compared_and_one_cannot_be(tmp_path: Path) -> None:
    narrow = build_sae("topk", D_MODEL, Z, tmp_path / "narrow", d_sae=48, reshape_activations="hook_z")
    made = target(tmp_path, narrow)
    own = claim("D18", min_documents=5)
    one = judge(own, d18_width.width_evidence(own, made))
    assert one.outcome == Outcome.CANNOT_RUN and "one width only" in one.reason
    wide = tiny_sae(Z, d_sae=192, reshape_activations="hook_z")
    made.dictionaries = {Z: made.dictionaries[Z], f"wide {Z}": wide}
    assert d18_width.widths(made) == {1: {48: made.dictionaries[Z], 192: wide}}
    found = d18_width.width_evidence(own, made)
    assert judge(own, found).outcome in (Outcome.REFUTED, Outcome.INCONCLUSIVE)
    numbers = found.detail["by dictionary"]
    assert numbers["layer 1, 192 features"]["L0"] == pytest.approx(6, abs=0.01)


@pytest.mark.usefixtures("short_repeats")
def test_widths_are_those_of_the_studys_arm_where_it_has_one(tmp_path: Path) -> None:
    first = build_sae("topk", D_MODEL, Z, tmp_path / "own", d_sae=96, reshape_activations="hook_z")
    target(tmp_path, first)
    place = tmp_path / "tiny.toml"
    arms = (("dense-width", 48), ("dense-width", 192), ("dense-width", 64), ("dense", 32))
    for arm, d_sae in arms:
        build_sae("topk", D_MODEL, Z, tmp_path / f"{arm}{d_sae}", d_sae=d_sae, reshape_activations="hook_z")
    entries = [f'[[study]]\narm = "{arm}"\nhook = "{Z}"\npath = "{arm}{d_sae}"\n' for arm, d_sae in arms]
    place.write_text(place.read_text() + "".join(entries))
    made = fra.load_target(place)
    assert {layer: sorted(of) for layer, of in d18_width.widths(made).items()} == {1: [48, 64, 192]}
    assert all(int(sae.cfg.d_sae) == width for width, sae in d18_width.widths(made)[1].items())
    own = claim("D18", min_documents=5)
    found = d18_width.width_evidence(own, made)
    numbers = found.detail["by dictionary"]
    assert list(numbers) == [f"layer 1, {d_sae} features" for d_sae in (48, 64, 192)]
    gain = numbers["layer 1, 192 features"]["tokens a document"] - numbers["layer 1, 48 features"]["tokens a document"]
    assert found.candidates["every dictionary"][0].effect == pytest.approx(gain)
    luck = "tokens a document, dealt anew"
    less = gain - numbers["layer 1, 192 features"][luck] + numbers["layer 1, 48 features"][luck]
    assert found.candidates["every dictionary"][1].effect == pytest.approx(less)


def test_a_dictionary_that_never_fires_is_said_to() -> None:
    some = made_up(blocks_of([0, 1, 2, 3]))
    silent = dataclasses.replace(some, live=some.live.where(some.live.pos < 0))
    assert len(silent.shuffled(0).live) == 0


@pytest.mark.usefixtures("short_repeats")
def test_tokens_found_are_counted_by_document(tmp_path: Path) -> None:
    made = target(tmp_path, build_sae("topk", D_MODEL, Z, tmp_path / "sae", reshape_activations="hook_z"))
    batch = document_sets.documents(made, "repeated_natural", RepeatedSets())["confirmation"]
    sae = made.dictionaries[Z]
    count, dealt, _ = d18_width.tokens_found(made, sae, batch, 0)
    o = observe(made.model, sae, d05_sources.documents_of(batch))
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
    generator = torch.Generator().manual_seed(0)
    deals = [own[torch.randperm(len(own), generator=generator)].tolist() for _ in range(20)]
    assert dealt == pytest.approx(np.mean([by_hand(deal) for deal in deals], axis=0))
