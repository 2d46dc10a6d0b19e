"""What a run leaves for machines that read it: properties in JUnit's XML, GitHub's annotations."""

import xml.etree.ElementTree as ET

import pytest

from fra.tests.suites import EXPECTED, suite

__all__ = ["suite"]


def test_junit_carries_the_verdict_and_its_numbers(suite):
    suite.all()
    suite.run("--junitxml", "out.xml", "--ledger", "ledger.json")
    rows = {(row["claim"], row["head"]): row for row in suite.rows()}
    seen = 0
    for case in ET.parse(suite.path / "out.xml").getroot().iter("testcase"):
        found = {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
        row = rows[found["claim"], found.get("head")]
        assert found["verdict"] == row["verdict"]
        for name in ("effect", "low", "high", "bar", "p", "n"):
            assert (name in found) == (row[name] is not None), name
            if name in found:
                assert float(found[name]) == row[name]
        seen += 1
        if found["claim"] == "T01":
            assert ("overturned" in found) == (found["head"] == "L0H3")
            assert found.get("known") == ("carried by the bias" if found["head"] == "L0H2" else None)
    assert seen == len(rows) == 2 * len(EXPECTED) + 1


@pytest.mark.parametrize("on_github", [True, False])
def test_overturned_rows_are_annotations_on_github_alone(suite, monkeypatch, on_github):
    suite.all()
    known = suite.path / "claims" / "known.toml"
    known.write_text(known.read_text().replace("looked dead", "100 %, dead"))
    monkeypatch.setenv("GITHUB_ACTIONS", "true") if on_github else monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    lines = [line for line in suite.run("-q").stdout.lines if line.startswith("::")]
    expected = (
        "::error file=claims/test_heads.py,line=1,title=T01 L0H3 is overturned::T01 L0H3 of tiny is SUPPORTED "
        "(effect 3, bar 1) and known.toml records a refutation: 100 %25, dead"
    )
    assert lines == ([expected] if on_github else [])
