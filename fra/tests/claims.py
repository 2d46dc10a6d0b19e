"""Claims as their own files declare them, for tests that hold something against a claim's bars."""

from __future__ import annotations

import dataclasses
import runpy
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fra.claim import Claim

FOLDER = Path(__file__).resolve().parents[2] / "claims"


def declared_in(file: Path) -> Iterator[Claim]:
    """The claims that are constants of a claim file, alone or in tuples."""
    for value in runpy.run_path(str(file)).values():
        yield from (each for each in (value if isinstance(value, tuple) else (value,)) if isinstance(each, Claim))


@cache
def _declared(number: str) -> Mapping[str, Claim]:
    files = sorted(FOLDER.rglob(f"test_*{number.lower()}*.py"))
    return {claim.id: claim for file in files for claim in declared_in(file)}


def claim(name: str, **changed: Any) -> Claim:
    """The claim of that id, bars and all; `changed` fields differ (fewer documents, say)."""
    return dataclasses.replace(_declared(name.split(".")[0])[name], **changed)
