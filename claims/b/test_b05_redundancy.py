"""B05. Features of block-diagonal dictionaries are redundant across heads.

Where two heads read the same thing, a dictionary of each head's own features has it twice, and a dense dictionary might
have it once. B05: every live feature of the per-head TopK dictionary (middle sparsity, equal width) gets its best match
among the features of *other* heads by activation Jaccard on documents of selection; how much the two fire together is
measured on others. Statistic: mean Jaccard over features, less what the same search finds where sequences are shuffled
(features of one document beside those of another, same positions; 20 shuffles).

B05.dense: features of several heads that fire together (Jaccard 0.3 or more) make a set; does one feature of the dense
dictionary of equal L0 fire where the set does? Mean Jaccard of the best dense feature with the set's union.

H0: the excess is at most 0.10 (B05); a dense feature's Jaccard with the set is at most 0.5, or no more than 0.10 above
shuffled sequences (B05.dense). Bars: 0.10 is what it would be if one feature in five had a twin that fires with it half
of the time; 0.5: together more often than not. Power: the chance to find the claim true at twice the bar, or at 0.6.
The authors of block-diagonal dictionaries left both open.
"""

import pytest

from fra.claim import Claim

REDUNDANT = Claim(
    id="B05",
    title="Features are redundant across heads",
    h0="mean Jaccard with the best match in another head, less shuffled sequences, <= 0.10",
    bar=0.10,
    statistic="redundancy/1",
    stimuli=("natural",),
    n=120,
    min_documents=40,
)
COVERED = Claim(
    id="B05.dense",
    title="One dense feature covers a set of like features of several heads",
    h0="mean Jaccard of the best dense feature with the set's union <= 0.5",
    bar=0.5,
    bars={"Jaccard over shuffled": 0.10},
    statistic="covering/1",
    stimuli=("natural",),
    n=120,
    min_documents=40,
)


@pytest.fixture(scope="module")
def evidence(frontier):
    from fra.measures.block_diagonal.b05_likeness import covering_evidence, redundancy_evidence

    study = frontier(REDUNDANT.n)
    return {REDUNDANT.id: redundancy_evidence(REDUNDANT, study), COVERED.id: covering_evidence(COVERED, study)}


@pytest.mark.parametrize("claim", [REDUNDANT, COVERED], ids=lambda claim: claim.id)
def test_b05(claim, evidence, verdict):
    verdict(evidence[claim.id])
