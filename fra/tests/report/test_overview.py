"""The report's first screen: what was found, what is new, the wall, the forest plot, groups of details."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fra.report import overview
from fra.report.page import render
from fra.report.words import GROUPS, grouped
from fra.verdicts.ledger import Ledger

CLAIMS = {"A01": "finding", "A02": "finding", "B01": "identity"}


def _row(claim: str, head: str | None, verdict: str, **detail: Any) -> dict[str, Any]:
    some = verdict in ("SUPPORTED", "REFUTED", "INCONCLUSIVE")
    numbers = {"effect": 2.0, "low": 1.5, "high": None, "bar": 1.0, "p": 0.01, "q": 0.02, "n": 50}
    return {
        "claim": claim, "target": "tiny", "head": head, "verdict": verdict, "digest": "0" * 64,
        **(numbers if some else dict.fromkeys(numbers)), "detail": {"reason": "because"} | detail,
    }  # fmt: skip


def _ledger(rows: list[dict[str, Any]], **header: Any) -> Ledger:
    note = {
        "h0": "E <= 1",
        "bar": 1.0,
        "above": True,
        "level": 0.05,
        "statistic": "s/1",
        "stimuli": ["made"],
        "n": 50,
        "condition": "effect",
    }
    claims = {
        claim: note | {"title": f"Title of {claim} <b>", "kind": kind, "exploratory": False}
        for claim, kind in CLAIMS.items()
    }
    base = {
        "target": "tiny", "model": "m", "versions": {}, "commit": None, "device": "cpu", "seed": "0",
        "started": "2026-01-02T03:04:05+00:00", "seconds": 90.0, "options": {}, "claims": claims,
    }  # fmt: skip
    return Ledger.model_validate({"schema": 1, "header": base | header, "verdicts": rows})


ROWS = [
    _row("A01", "L0H0", "SUPPORTED"),
    _row("A01", "L0H1", "REFUTED", known="it was"),
    _row("A01", "L1H0", "INCONCLUSIVE", borderline="turns with the seed"),
    _row("A01", "L1H1", "NOT_APPLICABLE"),
    _row("A02", "L0H0", "REFUTED"),
    _row("A02", "L0H1", "SUPPORTED", overturned="looked dead"),
    _row("A02", "L1H0", "BROKEN"),
    _row("B01", None, "SUPPORTED"),
]


def test_the_first_screen_keeps_findings_apart_and_names_what_to_look_at() -> None:
    seen = overview.overview(_ledger(ROWS))
    assert [(one.claim, one.supported, one.n_refuted, one.n_undecided) for one in seen.found] == [
        ("A01", ["L0H0"], 1, 1),
        ("A02", ["L0H1"], 1, 0),
    ], "an identity is no finding"
    assert seen.none == 0 and seen.changed is None
    named = [[(row.claim, row.head) for row in rows] for rows in (seen.overturned, seen.broken, seen.borderline)]
    assert named == [[("A02", "L0H1")], [("A02", "L1H0")], [("A01", "L1H0")]]
    nothing = overview.overview(_ledger([_row("A01", "L0H0", "REFUTED"), _row("A02", "L0H0", "NOT_APPLICABLE")]))
    assert (nothing.found, nothing.none) == ([], 1), "a claim that nobody was asked is no finding that failed"


def test_what_is_new_since_an_earlier_ledger() -> None:
    before = [row | {"verdict": "INCONCLUSIVE"} if row["head"] == "L0H0" else row for row in ROWS if row["head"]]
    seen = overview.overview(_ledger(ROWS), _ledger(before))
    assert seen.changed is not None
    assert [(one.row.claim, one.row.head, one.before) for one in seen.changed] == [
        ("A01", "L0H0", "INCONCLUSIVE"),
        ("A02", "L0H0", "INCONCLUSIVE"),
        ("B01", None, None),
    ]
    assert sum(seen.turns.values()) == 3 and seen.turns["no such row → SUPPORTED"] == 1
    page = render(_ledger(ROWS), baseline=_ledger(before, started="2025-12-31T23:59:59+00:00"))
    assert "held against the ledger of 2025-12-31 23:59" in page and "no such row →" in page
    assert "New since" not in render(_ledger(ROWS))
    assert "No verdict changed." in render(_ledger(ROWS), baseline=_ledger(ROWS))
    assert "<b>" not in re.sub(r"<b>[^<]*</b>", "", page.partition("</header>")[0]), "titles are text"


def _cells(path: str) -> set[tuple[float, float]]:
    return {(float(x), float(y)) for x, y in re.findall(r"M([\d.]+) ([\d.]+)h", path)}


def test_the_wall_has_a_mark_for_every_verdict_where_its_head_stands() -> None:
    drawn = overview.wall(_ledger(ROWS))
    assert drawn is not None
    start = dict(drawn["heads"])
    assert list(start) == ["family", "L0H0", "L0H1", "L1H0", "L1H1"]
    assert start["L1H0"] - start["L0H1"] > start["L0H1"] - start["L0H0"], "a gap between layers"
    first, second, third = (dict(row["paths"]) for row in drawn["rows"])
    assert {word: {x for x, _ in _cells(path)} for word, path in first.items()} == {
        "SUPPORTED": {start["L0H0"]}, "REFUTED": {start["L0H1"]}, "INCONCLUSIVE": {start["L1H0"]},
    }  # fmt: skip
    assert {x for x, _ in _cells(second["overturned"])} == {start["L0H1"]}
    assert {x for x, _ in _cells(third["SUPPORTED"])} == {start["family"]}
    height = {word: float(re.findall(r"v([\d.]+)h", path)[0]) for word, path in (first | second).items()}
    assert len({height[word] for word in ("SUPPORTED", "REFUTED", "INCONCLUSIVE")}) == 3, "told without colour"
    assert overview.wall(_ledger([_row("B01", None, "SUPPORTED")])) is None


def test_270_heads_fit_on_a_page() -> None:
    rows = [_row("A01", f"L{layer}H{head}", "SUPPORTED") for layer in range(30) for head in range(9)]
    drawn = overview.wall(_ledger(rows))
    assert drawn is not None
    assert drawn["n_heads"] == 270 and drawn["width"] <= 1240
    ((_, path),) = drawn["rows"][0]["paths"]
    assert len(_cells(path)) == 270


def _condition(**more: Any) -> dict[str, Any]:
    base = {"effect": 2.0, "low": 1.0, "high": 3.0, "bar": 1.5, "above": True, "p": 0.1, "holds": True, "fails": False}
    return base | more


def test_the_forest_plot_puts_the_claimed_side_to_the_right() -> None:
    middle = overview.FOREST / 2
    above, below, open_, none, huge = overview.forest(
        {
            "above": _condition(),
            "below": _condition(above=False),
            "open": _condition(low=None, high=None),
            "none": _condition(effect=None, low=None, high=None),
            "huge": _condition(effect=1.7e308, low=-1.7e308, high=None, bar=0.0),
        }
    )
    assert above["at"]["low"] < middle < above["at"]["effect"] < above["at"]["high"]
    assert below["at"]["high"] < below["at"]["effect"] < middle < below["at"]["low"]
    assert above["at"]["effect"] - middle == pytest.approx((above["at"]["high"] - middle) / 3, abs=0.11)
    assert (open_["at"]["low"], open_["at"]["high"]) == (8.0, overview.FOREST - 8.0)
    assert none["at"] is None
    assert huge["at"]["low"] < middle < huge["at"]["effect"] <= huge["at"]["high"]


def test_details_are_grouped_and_none_is_lost() -> None:
    detail = {
        "status": "TIH", "strongest channels": [1], "largest effect of random atoms": 2, "effect by quarter": 3,
        "Jaccard of random heads' features": 4, "head's contrast": 5,
    }  # fmt: skip
    found = grouped(detail)
    assert [name for name, _, _ in found] == list(GROUPS)
    by = {name: list(values) for name, _, values in found}
    assert by["controls and nulls"] == ["largest effect of random atoms", "Jaccard of random heads' features"]
    assert by["the head"] == ["status", "head's contrast"]
    assert {key: value for _, _, values in found for key, value in values.items()} == detail
    assert grouped({}) == []
