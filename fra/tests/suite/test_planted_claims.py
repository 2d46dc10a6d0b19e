"""Planted true, false and underpowered claims come out SUPPORTED, REFUTED and INCONCLUSIVE, end to end through pytest
(CLAIMS M03): a claim file measures the hand-built circuit, whose induction head was written down.
"""

from __future__ import annotations

import numpy as np
import pytest

from fra.induction.status import patterns, stripe_attention
from fra.stimuli import repeated
from fra.tests import circuit
from fra.tests.suites import Suite, suite

__all__ = ["suite"]

TARGET = """
name = "circuit"
[model]
name = "nobody/circuit"
[text]
documents = "nowhere"
[size]
n_layers = 2
n_heads = 2
"""

CLAIMS = """
    import pytest
    from fra.claim import Claim, family

    def claim(name, bar, n):
        return Claim(id=name, title=f"Attends to the induction key by more than {bar}", h0=f"E <= {bar}", bar=bar,
                     statistic="stripe/1", stimuli=("repeated_random",), n=n)

    # L1H0 attends there with all its weight, no other head does: true of one, false of three
    TRUE_OF_ONE = claim("P01", 0.5, 60)
    # measured on six documents, too few to say anything
    FEW = claim("P02", 0.5, 60)
    # what L0H1, a head of random weights, gives a key differs from document to document: its own mean is no bar
    AT_THE_MEAN = claim("P03", @@, 60)

    @pytest.fixture(scope="module")
    def evidence():
        import numpy as np
        from fra.stimuli import repeated as stimuli
        from fra.induction.status import patterns, stripe_attention
        from fra.tests import circuit

        found = {}
        for one in (TRUE_OF_ONE, FEW, AT_THE_MEAN):
            n = 6 if one is FEW else one.n
            made = stimuli.repeated_random(n, np.arange(48), circuit.N_CTX, circuit.BOS, (one.id,))
            batch = stimuli.collate(made)
            pattern = patterns(circuit.model(), batch.tokens)
            samples = {}
            for layer in range(2):
                for head in range(2):
                    rows = stripe_attention(pattern[layer, :, head], batch)["induction"]
                    samples[f"L{layer}H{head}"] = [float(rows[batch.row_doc == d].mean()) for d in range(n)]
            found[one.id] = family(one, samples, target="circuit", sources=None)
        return found

    @pytest.mark.parametrize("claim", [TRUE_OF_ONE, FEW, AT_THE_MEAN], ids=lambda claim: claim.id)
    def test_planted(claim, head, evidence, verdict):
        verdict(evidence[claim.id][head])
"""


def own_mean() -> float:
    """What L0H1 gives the induction key on documents of another seed."""
    batch = repeated.collate(repeated.repeated_random(400, np.arange(48), circuit.N_CTX, circuit.BOS, ("others",)))
    rows = stripe_attention(patterns(circuit.model(), batch.tokens)[0, :, 1], batch)["induction"]
    by_document = [float(rows[batch.row_doc == d].mean()) for d in range(len(batch))]
    return float(np.mean(by_document))


def test_planted_claims_come_out_as_planted(suite: Suite) -> None:
    suite.write("tiny.toml", TARGET)
    suite.claims(planted=CLAIMS.replace("@@", str(own_mean())))
    suite.run("--ledger", "ledger.json", ret=1)
    found = {(row["claim"], row["head"]): row for row in suite.rows()}
    words = {key: row["verdict"] for key, row in found.items()}
    assert {head: words["P01", head] for head in ("L0H0", "L0H1", "L1H0", "L1H1")} == {
        "L0H0": "REFUTED",
        "L0H1": "REFUTED",
        "L1H0": "SUPPORTED",
        "L1H1": "REFUTED",
    }
    assert {words["P02", head] for head in ("L0H0", "L0H1", "L1H0", "L1H1")} == {"INCONCLUSIVE"}
    assert words["P03", "L0H1"] == "INCONCLUSIVE", "at the bar neither side may be claimed"
    assert words["P03", "L1H0"] == "SUPPORTED"
    supported = found["P01", "L1H0"]
    assert supported["low"] > supported["bar"] > found["P01", "L1H1"]["high"]


@pytest.mark.parametrize(("bar", "word"), [(0.9, "SUPPORTED"), (1.001, "REFUTED")])
def test_a_bar_on_the_other_side_turns_the_verdict(suite: Suite, bar: float, word: str) -> None:
    """The circuit's head gives the key between 0.9 and 1 of its attention."""
    suite.write("tiny.toml", TARGET)
    suite.claims(planted=CLAIMS.replace("@@", "0.5").replace('"P01", 0.5', f'"P01", {bar}'))
    suite.run("--ledger", "ledger.json", ret=1)
    assert next(r["verdict"] for r in suite.rows() if (r["claim"], r["head"]) == ("P01", "L1H0")) == word
