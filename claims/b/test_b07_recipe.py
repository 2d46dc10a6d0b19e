"""B07. Initialisation and recipe of a block-diagonal dictionary matter.

B07: tied start, zero biases and a scale for each head's input against the plain `nn.Linear` start that the published
code kept (untied, random biases, no scale), per-head TopK at three sparsities, equal width and training tokens. Each of
the three alone taken away, at one sparsity and in one run, stands in the detail. "Zero biases" are those of the
encoder: the decoder's bias starts at the mean of the data (SAELens' usual) where the plain start draws it at random, so
that the arms compare mean and random starts of it, too.

B07.recipes: of the two published training recipes, decoder rows held at norm 1 under a plain L1 penalty (Bricken et al.
2023) against free rows under a penalty that weighs activations by decoder norm (April 2024); those who trained
block-diagonal dictionaries by the latter suspected that the former had the better tradeoff. Everything else is equal;
dead features are not resampled in either. Both on natural passages read twice.

H0: the share of the loss recovered at equal L0 is not more than 0.01 above the other's. Control: the other arm, on the
same tokens in the same order. Three training runs an arm; sources of text and runs are both in the interval. Gate: in
every run the first arm's densest point recovers half of the loss. Bar: a hundredth is the least that would make one
choose. Worth seeing: as much again, an effect of twice the bar.
"""

import pytest

from fra.claim import Claim
from fra.measures.block_diagonal.designs import ComparedArms, Study

START, RECIPES = (
    Claim(
        id=id,
        title=title,
        h0=f"loss recovered at equal L0, {what}, <= 0.01",
        condition="loss recovered, difference",
        bar=0.01,
        gates={"the control arm recovers": 0.5},
        statistic="frontier/2",
        stimuli=("repeated_natural",),
        n=120,
        min_sources=40,
        design=(Study(), ComparedArms()),
    )
    for id, title, what in (
        ("B07", "Tied start, zero biases and per-head scale matter", "recipe minus plain nn.Linear start"),
        ("B07.recipes", "Unit decoders with plain L1 beat free ones", "unit decoders minus free decoders"),
    )
)
ALONE = ("block-no-head-scale", "block-no-tied-init", "block-no-zero-biases")


@pytest.fixture(scope="module")
def evidence(frontier):
    from fra.measures.block_diagonal.b03_b04_b07_compare import compare

    study = frontier(START.designed(Study), *START.stimuli)
    start = compare(START, study, "block-width", "block-plain", control="block-width", further=ALONE)
    recipes = compare(RECIPES, study, "block-l1-unit", "block-l1", control="block-l1-unit")
    return {START.id: start, RECIPES.id: recipes}


@pytest.mark.parametrize("claim", [START, RECIPES], ids=lambda claim: claim.id)
def test_b07(claim, evidence, verdict):
    verdict(evidence[claim.id])
