"""Q07, Q17. Taking CIH channels out of a head changes what the model does, and little else.

The CIH set of a token induction head (TIH), its 50 discovery channels (as in Q04), is removed from the head's scores
inside a forward pass, on documents of their own (those for sets). What counts is the model's output on the rows of the
second copy: the logit of the token to be copied (less the mean of all logits), its loss, and KL of the whole output.
Attention at the stripe changes by construction and is no evidence.

Q07, H0: the copied token's logit falls by <= 0.10, or its loss rises by <= 0.02 nat, or the fall is no more than a
tenth of what mean ablation of the whole head does, or than what the 50 channels of largest plain sum do, or logit, loss
or KL rank no higher than random live sets do. Controls: random *live* sets of the same size, each member replaced by a
live channel of like mass and the set taken out so many times over that it moves as much attention, within 1 % (summed
over all rows, of both copies, of 10 confirmation documents; all effects are those on other documents); since so near a
match can still be won by a hair, the logit per attention moved on the second copy must rank as high too. They are drawn
one after another, each from a seed of its own, as long as the head can still pass; where fewer than half of 20 sets
that are tried first can be matched at all, there is no such null and the ranks are not measured; a set that cannot be
matched is drawn again, and a draw in which 20 in a row fail counts against. The top set by plain sum; zero and mean
ablation of the head.
Bar: 0.10 of logit is a tenth off the odds, the least that a reader of the output would call a change; where the model
puts 0.8 on the token, it costs 0.02 nat. A tenth of the head is Q04's bar. Worth seeing beyond the top set by plain sum
is what is worth seeing at all, 0.10 of logit.

Q17, H0: KL of the output on rows of the *first* copy, where nothing can be copied yet, is >= 0.2 of KL on the second,
or >= 0.5 of what mean ablation of the whole head does there when it goes only so far towards the mean that the copied
token's logit falls as much (how far is found on confirmation documents). Gate: the removal lowers that logit by more
than 0.10, else there is nothing to be selective about. Bar: a change five times as large where it should be as where it
should not; half the side effect of the crude way. A refutation needs the power to tell from its bar a removal that does
nothing there.

Sets of 1, 500 and 5 000 channels, the set removed on the stripe alone and off it alone, and frozen as well as free
scales downstream stand in `detail`.
"""

import pytest

from fra.claim import Claim
from fra.induction.designs import TokenInduction
from fra.measures.channels.transfer_designs import ChannelSet, MatchedSets, Removal
from fra.stimuli.designs import RepeatedSets

DESIGN = (RepeatedSets(), TokenInduction(), ChannelSet(), Removal(), MatchedSets())
REMOVAL = Claim(
    id="Q07",
    title="Removing CIH channels changes what the model does",
    h0="the copied token's logit falls by <= 0.10 when the CIH set is removed",
    condition="copied-token logit",
    bar=0.10,
    bars={
        "loss": 0.02,
        "share of the head's": 0.1,
        "over the top set by plain sum": 0.0,
        "over random live sets: logit": 0.95,
        "over random live sets: loss": 0.95,
        "over random live sets: KL": 0.95,
        "over random live sets: logit per attention moved": 0.95,
    },
    worth={"over the top set by plain sum": 0.10},
    statistic="removal/4",
    stimuli=("repeated_random",),
    n=Removal().measured,
    design=DESIGN,
)
SELECTIVE = Claim(
    id="Q17",
    title="Removal of CIH channels is selective",
    h0="KL on the first copy >= 0.2 of KL on the second when the CIH set is removed",
    condition="off the stripe, against on it",
    bar=0.2,
    above=False,
    bars={"off the stripe, against ablation at equal suppression": 0.5},
    below=("off the stripe, against ablation at equal suppression",),
    gates={"copied-token logit": 0.10},
    statistic="selectivity/2",
    stimuli=("repeated_random",),
    n=Removal().measured,
    design=DESIGN,
)


@pytest.fixture(scope="module")
def evidence(target, screens, progress):
    from fra.induction.cih import families
    from fra.measures.channels.q07_q17_evidence import plan_of, removal_evidence, selectivity_evidence
    from fra.measures.channels.q07_q17_removal import removals

    screened = screens(REMOVAL.stimuli[0])
    heads = families(screened)["TIH"]
    found = removals(target, screened, heads, plan_of(REMOVAL), REMOVAL.designed(RepeatedSets), progress)
    return {
        "Q07": removal_evidence(REMOVAL, screened, found),
        "Q17": selectivity_evidence(SELECTIVE, screened, found),
    }


@pytest.mark.parametrize("claim", [REMOVAL, SELECTIVE], ids=lambda claim: claim.id)
def test_q07_q17(claim, head, evidence, verdict):
    verdict(evidence[claim.id][head])
