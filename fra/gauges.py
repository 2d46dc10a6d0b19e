"""What a change of weights that changes nothing does to attributions: the measure of Q13, and the edits themselves."""

from fra.interventions.gauges import basis, key_bias, mean_direction, rank_one, turned, why_not
from fra.measures.identities.q13_gauges import STAYS, Moved, measure

__all__ = ["STAYS", "Moved", "basis", "key_bias", "mean_direction", "measure", "rank_one", "turned", "why_not"]
