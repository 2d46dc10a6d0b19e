"""What a claim file imports: the claim, the evidence for it, the judge.

| verdict | when |
|---|---|
| SUPPORTED | H0 "effect <= bar" is rejected for every condition of one and the same candidate |
| REFUTED | H0 "effect >= bar" is rejected for some condition of every candidate, and the design had power |
| INCONCLUSIVE | neither; or too few sources, numbers that are not finite, a gate that was not met |
| CANNOT_RUN | something needed is not there: a GPU, weights, a dictionary at that hook |
| NOT_APPLICABLE | the head is not in the claim's family |
"""

from fra.verdicts.claim import Claim, Condition, Evidence, parse_head
from fra.verdicts.judge import Outcome, Verdict, judge
from fra.verdicts.samples import family

__all__ = ["Claim", "Condition", "Evidence", "Outcome", "Verdict", "family", "judge", "parse_head"]
