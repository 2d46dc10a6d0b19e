"""The pytest side, end to end on claims made for it: every row of the verdict table, and no way around the verdict."""

import pytest

from fra.tests.suites import BROKEN_FILE, CLAIM_FILE, EXPECTED, FAMILY_FILE, KNOWN, outcomes, suite
from fra.verdicts.ledger import WORDS

__all__ = ["suite"]


def test_every_row_of_the_verdict_table(suite):
    suite.all()
    result = suite.run("--ledger", "ledger.json", "-v", ret=1)
    counts = {
        word: sum(w == word for w, _ in EXPECTED.values()) for word in ("failed", "skipped", "xfailed", "inconclusive")
    }
    # T02's fixture raises eight times: errors, although known.toml records a refutation of T02.
    assert outcomes(result) == {**counts, "passed": 2, "errors": 8}
    rows = suite.rows()
    assert [(r["claim"], r["head"]) for r in rows] == [
        *(("T01", f"L0H{h}") for h in range(8)),
        *(("T02", f"L0H{h}") for h in range(8)),
        ("T03", None),
    ]
    by_head = {r["head"]: r for r in rows if r["claim"] == "T01"}
    assert {head: r["verdict"] for head, r in by_head.items()} == {head: word for head, (_, word) in EXPECTED.items()}
    assert by_head["L0H2"]["detail"]["known"] == "carried by the bias"
    assert by_head["L0H3"]["detail"]["overturned"] == "looked dead"
    assert "overturned" not in by_head["L0H0"]["detail"]
    assert by_head["L0H4"]["detail"]["table"] == [1.0, 1.0]
    assert (by_head["L0H0"]["effect"], by_head["L0H4"]["low"], by_head["L0H5"]["effect"]) == (2.0, None, None)
    assert by_head["L0H6"]["detail"]["reason"] == "ZeroDivisionError: in the test"
    assert by_head["L0H7"]["detail"]["reason"] == "not in the family"
    assert {r["verdict"] for r in rows if r["claim"] == "T02"} == {"BROKEN"}
    assert all(r["detail"]["exploratory"] for r in rows)
    said = result.stdout.str()
    assert "although known.toml records a refutation (looked dead)" in said
    assert "XPASS" not in said
    for head, (_, word) in EXPECTED.items():
        shown = {"L0H3": "OVERTURNED"}.get(head, word)
        assert f"test_heads[{head}] {shown}" in said
    result.stdout.fnmatch_lines(
        ["*L0H0*SUPPORTED (EXPLORATORY)*", "*L0H2*REFUTED (known)*", "*ERROR at setup of test_broken*"]
    )


def test_a_known_refutation_alone_is_exit_code_0(suite):
    suite.claims(heads=CLAIM_FILE)
    suite.write("claims/known.toml", KNOWN[: KNOWN.index("[[known]]", 20)])
    suite.run("-k", "H0 or H2", ret=0)
    suite.write("claims/known.toml", KNOWN[: KNOWN.index("[[known]]", 20)].replace('"tiny"', '"another"'))
    suite.run("-k", "H0 or H2", ret=1)
    suite.write("claims/known.toml", KNOWN[: KNOWN.index("[[known]]", 20)].replace('head = "L0H2"\n', ""))
    suite.run("-k", "H1 or H2", ret=0)  # without a head: all of them
    suite.run("-k", "H0", ret=1)  # overturned


def test_what_a_fixture_lacks_cannot_run(suite):
    lacking = FAMILY_FILE.replace('progress("measuring the family")', 'pytest.skip("no dictionary at blocks.0.hook")')
    suite.claims(family=lacking)
    result = suite.run("--ledger", "ledger.json", "-v", ret=0)
    result.stdout.fnmatch_lines(["*test_family CANNOT_RUN*"])
    [row] = suite.rows()
    assert (row["verdict"], row["detail"]["reason"]) == ("CANNOT_RUN", "no dictionary at blocks.0.hook")
    suite.claims(family=FAMILY_FILE.replace('progress("measuring the family")', "").replace("progress", "target"))
    result = suite.run("--ledger", "ledger.json", ret=0)
    [row] = suite.rows()
    assert row["verdict"] == "CANNOT_RUN"
    assert "hub" in row["detail"]["reason"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("pass", "never called verdict"),
        ("verdict(evidence); verdict(evidence)", "called twice"),
        ("import dataclasses; verdict(dataclasses.replace(evidence, head='L0H0'))", "about T03 at the family"),
        ("verdict(evidence); assert False, 'afterwards'", "AssertionError"),
        ("pytest.xfail('by hand')", "by hand"),
    ],
)
def test_a_test_that_gets_around_the_verdict_fails(suite, body, says):
    suite.claims(family=FAMILY_FILE.replace('assert verdict(evidence).outcome == "SUPPORTED"', body))
    result = suite.run("--ledger", "ledger.json", ret=1)
    assert outcomes(result) == {"failed": 1}
    [row] = suite.rows()
    assert row["verdict"] == "BROKEN"
    assert says in row["detail"]["reason"]


def test_a_verdict_cannot_be_swallowed(suite):
    swallowing = CLAIM_FILE.replace(
        "verdict(evidence.get(head))",
        "\n        try:\n            verdict(evidence.get(head))\n        except BaseException:\n            pass",
    )
    suite.claims(heads=swallowing)
    result = suite.run("-k", "H0 or H1 or H4")
    assert outcomes(result) == {"passed": 1, "failed": 1, "inconclusive": 1, "deselected": 5}


def test_a_set_up_error_stays_red_whatever_the_marks_say(suite):
    marked = BROKEN_FILE.replace("def test_broken", "@pytest.mark.xfail\n    def test_broken")
    suite.claims(broken=marked)
    result = suite.run("--ledger", "ledger.json", ret=1)
    assert outcomes(result) == {"errors": 8}
    assert {r["verdict"] for r in suite.rows()} == {"BROKEN"}


def test_an_xfail_mark_in_a_claim_file_is_refused(suite):
    suite.claims(heads=CLAIM_FILE.replace("def test_heads", "@pytest.mark.xfail\n    def test_heads"))
    result = suite.run("-k", "H1", ret=1)
    result.stdout.fnmatch_lines(["*is a row of known.toml, not an xfail mark*"])


def test_two_tests_of_one_claim_at_one_head_are_refused(suite):
    suite.claims(family=FAMILY_FILE + "\n    def test_again(evidence, verdict):\n        verdict(evidence)\n")
    result = suite.run(ret=1)
    assert outcomes(result) == {"passed": 1, "errors": 1}
    result.stdout.fnmatch_lines(["*T03 has two tests for the family*"])


def test_which_claim_a_test_is_about(suite):
    several = """
    import pytest
    from fra.claim import Claim, Evidence

    A, B, C = (Claim(id=f"T1{k}", title="t", h0="h", bar=0, statistic="s/1", stimuli=(), n=50) for k in range(3))

    @pytest.fixture(scope="module", params=[A, B], ids=lambda c: c.id)
    def claim(request):
        return request.param

    def test_by_parameter(claim, verdict):
        verdict(Evidence(claim=claim, head=None, cannot="of " + claim.id))

    @pytest.mark.claim(C)
    def test_by_mark(verdict):
        verdict(None)
    """
    suite.claims(several=several)
    suite.run("--ledger", "ledger.json", ret=0)
    words = ["CANNOT_RUN", "CANNOT_RUN", "NOT_APPLICABLE"]
    assert [(r["claim"], r["verdict"]) for r in suite.rows()] == [(f"T1{k}", word) for k, word in enumerate(words)]
    suite.claims(several=several.replace("@pytest.mark.claim(C)", ""))
    result = suite.run(ret=1)
    assert outcomes(result) == {"skipped": 2, "errors": 1}
    result.stdout.fnmatch_lines(["*is about no claim: *"])


def test_the_verdict_words_are_those_of_the_ledger():
    assert {word for _, word in EXPECTED.values()} <= set(WORDS)
