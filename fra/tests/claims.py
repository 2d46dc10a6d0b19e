"""Claims as their own files declare them, for tests that hold something against a claim's bars."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fixtures.registry import read_registry
from fra.claim import Claim

FOLDER = Path(__file__).resolve().parents[2] / "claims"


@cache
def _declared() -> Mapping[str, Claim]:
    return read_registry(FOLDER).claims


def claim(name: str, **changed: Any) -> Claim:
    """The claim of that id, bars and all; `changed` fields differ (fewer documents, say)."""
    return dataclasses.replace(_declared()[name], **changed)
