"""B05. Features of block-diagonal dictionaries are redundant across heads.

Where two heads read the same thing, a dictionary of each head's own features has it twice, and a dense dictionary might
have it once. B05: every live feature of the per-head TopK dictionary (middle sparsity, equal width) gets its best match
among the features of *other* heads by activation Jaccard on documents of one half of the sources; how much the two fire
together is measured on the other half. Statistic: mean Jaccard over features, less what the same search finds where
sequences are shuffled (features of one document beside those of a document of another source, same positions; 20
shuffles of each half), averaged over three training runs. Sources and runs are both in the interval; each run has
shuffles of its own, so that their scatter is in that of the runs.

B05.dense: features of several heads that fire together (Jaccard 0.3 or more) make a set; does one feature of the dense
dictionary of equal L0 fire where the set does? Mean Jaccard of the best dense feature with the set's union.

H0: the excess is at most 0.10 (B05); a dense feature's Jaccard with the set is at most 0.5, or no more than 0.10 above
shuffled sequences (B05.dense). Bars: 0.10 is what it would be if one feature in five had a twin that fires with it half
of the time; 0.5: together more often than not. Worth seeing: 0.10 beyond either.
The authors of block-diagonal dictionaries left both open.
"""

import pytest

from fra.claim import Claim
from fra.measures.block_diagonal.designs import ComparedArms, FeatureLikeness, Study

SHUFFLED, COVERING = "Jaccard over shuffled", "Jaccard of one dense feature with the set"
REDUNDANT = Claim(
    id="B05",
    title="Features are redundant across heads",
    h0="mean Jaccard with the best match in another head, less shuffled sequences, <= 0.10",
    condition=SHUFFLED,
    bar=0.10,
    statistic="redundancy/2",
    stimuli=("natural",),
    n=120,
    min_sources=40,
    design=(Study(), ComparedArms(), FeatureLikeness()),
)
COVERED = Claim(
    id="B05.dense",
    title="One dense feature covers a set of like features of several heads",
    h0="mean Jaccard of the best dense feature with the set's union <= 0.5",
    condition=COVERING,
    bar=0.5,
    bars={SHUFFLED: 0.10},
    worth={COVERING: 0.10},
    statistic="covering/2",
    stimuli=("natural",),
    n=120,
    min_sources=40,
    design=(Study(), ComparedArms(), FeatureLikeness()),
)


@pytest.fixture(scope="module")
def evidence(frontier):
    from fra.measures.block_diagonal.b05_likeness import covering_evidence, redundancy_evidence

    study = frontier(REDUNDANT.designed(Study))
    return {REDUNDANT.id: redundancy_evidence(REDUNDANT, study), COVERED.id: covering_evidence(COVERED, study)}


@pytest.mark.parametrize("claim", [REDUNDANT, COVERED], ids=lambda claim: claim.id)
def test_b05(claim, evidence, verdict):
    verdict(evidence[claim.id])
