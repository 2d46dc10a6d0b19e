"""Heads that a claim about a family of heads does not test, and why not: one text for each reason.

A head that is not in the family is NOT_APPLICABLE; one that is and lacks something, CANNOT_RUN.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol, runtime_checkable

from fra.induction.status import HeadStatus
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.samples import NO_INPUT_DICTIONARY

CONTROL = "a layer-0 head, whose keys cannot know their predecessors: a control, in no family"
BEST_EFFECT = "best channel effect (nats)"
"""What stands beside a control: the best that the search finds where nothing can be."""
NOT_AS_LISTED = "the target lists this head as a TIH, but it is {status} on {stimulus}"
_SAID = {"TIH": "a TIH", "undecided": "neither clearly a TIH nor clearly none"}


@runtime_checkable
class Family(Protocol):
    """Heads on one stimulus, as `fra.induction.cih.Screen` has them."""

    @property
    def stimulus(self) -> str:
        """What the status was measured on."""
        ...

    @property
    def status(self) -> Mapping[str, HeadStatus]:
        """Every head's."""
        ...

    @property
    def heads(self) -> Collection[str]:
        """Heads that could be measured."""
        ...

    @property
    def known_tih(self) -> Collection[str]:
        """Heads that the target lists as TIHs."""
        ...

    @property
    def controls(self) -> Mapping[str, float]:
        """Heads that are in no family whatever their status, and the best effect found there."""
        ...


def not_in_family(status: HeadStatus) -> str:
    """The reason, for a head of this status."""
    return f"not in the family: {_SAID.get(status.status, status.status)}"


def status_detail(status: HeadStatus) -> dict[str, Any]:
    """A head's status with the numbers behind it."""
    return {"status": status.status, "contrast": status.contrast, "low": status.lower, "high": status.upper} | {
        f"attention: {name}": value for name, value in status.stripes.items()
    }


def outside(
    claim: Claim,
    of: Family,
    family: str = "TIH",
    *,
    lacking: Callable[[str], str] = lambda _: NO_INPUT_DICTIONARY,
    about: Callable[[HeadStatus], dict[str, Any]] = status_detail,
) -> dict[str, Evidence]:
    """Why each head that is not tested stands outside the family. A head that the target lists as a TIH and that is
    none leaves the claim undecided there.

    lacking: what a head of the family lacks that could not be measured. about: what of its status stands beside.
    """
    found = {}
    for name, status in of.status.items():
        detail: dict[str, Any] = {"status": about(status)}
        undecided = stands = cannot = None
        if name in of.known_tih and status.status != "TIH":
            undecided = NOT_AS_LISTED.format(status=status.status, stimulus=of.stimulus)
        elif name in of.controls and status.status in ("TIH", family):
            stands, detail = CONTROL, detail | {BEST_EFFECT: of.controls[name]}
        elif status.status != family:
            stands = not_in_family(status)
        elif name not in of.heads:
            cannot = lacking(name)
        else:
            continue
        found[name] = Evidence(
            claim=claim, head=name, undecided=undecided, outside=stands, cannot=cannot, detail=detail
        )
    return found
