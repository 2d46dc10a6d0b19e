"""What is to be said of a target's text before anything is measured on it: too few sources, too short or repeated
documents.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fra.errors import FraError
from fra.statistics.unseen import sources_for
from fra.verdicts.claim import Claim

if TYPE_CHECKING:
    from fra.targets.documents import Document

_READ = 600
"""Characters of a document's beginning that are compared, about the 128 tokens that most claims read of one."""
_SHINGLE = 6
_SKETCH = 64
_ALIKE = 0.5
"""Share of pieces of six characters that two beginnings have in common from which on they count as the same; of
independent texts of a language it is a few hundredths.
"""
_SHORT = 80
"""Characters below which a document is short: about 20 tokens."""


def fewest_sources() -> int:
    """The least number of independent sources with which a test at 5 % can decide anything."""
    return sources_for(Claim.level)


def different(texts: Sequence[str]) -> list[int]:
    """For every text, the number of the first whose beginning is nearly the same: its own where there is none."""
    # The smallest hashes of a set are a sample of it, and those of a union a sample of the union.
    first: list[int] = []
    posts: dict[int, list[int]] = defaultdict(list)
    sketches: dict[int, list[int]] = {}
    for number, text in enumerate(texts):
        start = re.sub(r"\s+", " ", text[: 2 * _READ]).strip().casefold()[:_READ].encode()
        pieces = {zlib.crc32(start[k : k + _SHINGLE]) for k in range(max(1, len(start) - _SHINGLE + 1))}
        sketch = sorted(pieces)[:_SKETCH]
        shared = Counter(other for piece in sketch for other in posts[piece])
        same = next((other for other, _ in shared.most_common(3) if _likeness(sketch, sketches[other]) >= _ALIKE), None)
        first.append(number if same is None else same)
        if same is None:
            sketches[number] = sketch
            for piece in sketch:
                posts[piece].append(number)
    return first


def _likeness(one: list[int], other: list[int]) -> float:
    union = sorted({*one, *other})[: max(len(one), len(other))]
    return len({*union} & {*one} & {*other}) / len(union)


def remarks(target: str, documents: Sequence[Document], sources: str | None, cut: bool = False) -> list[str]:
    """Sentences about a target's documents that its user should know; none where all is well. `sources`: what the
    target says of them (`text.sources`). cut: whether they are pieces of one file.

    Raises FraError where all documents are the same text.
    """
    said = []
    first = different([document.text for document in documents])
    texts = len(set(first))
    if texts == 1 and len(documents) > 1:
        raise FraError(
            f"the {len(documents)} documents of {target!r} all begin with the same text: what is measured on them "
            "would be one document counted many times; give different texts."
        )
    own = {document.source for document in documents}
    if len(own) < fewest_sources():
        largest, n = Counter(document.source for document in documents).most_common(1)[0]
        why = ""
        if cut and sources in (None, "name") and n > 1:
            why = (
                f"; they are the pieces of one file, numbered by their position in it ({documents[0].name!r} first), "
                "and count as one source: if it holds separate texts, say what stands between them (text.separator), "
                'or, if its pieces are independent, set text.sources = "document"'
            )
        elif sources in (None, "name") and n > 1:
            why = (
                f"; documents whose names differ only after the last hyphen are one source, as the {n} of {largest!r}: "
                'if each is independent of the others, set text.sources = "document" (or "folder", or a pattern)'
            )
        elif len(documents) < fewest_sources():
            why = ": add text"
        said.append(
            f"{target!r} has {_n(len(documents), 'document')} of {_n(len(own), 'independent source')}, and a test that "
            f"resamples sources can decide nothing with fewer than {fewest_sources()}{why}."
        )
    again = [k for k, at in enumerate(first) if at != k and documents[k].source != documents[at].source]
    if again:
        one, other = documents[first[again[0]]].name, documents[again[0]].name
        said.append(
            f"{len(again)} of the {len(documents)} documents of {target!r} begin nearly as a document of another "
            f"source does ({other!r} as {one!r}): they count as independent and are not; remove them, or name their "
            "source in text.sources."
        )
    short = [document.name for document in documents if len(document.text.strip()) < _SHORT]
    if short:
        said.append(
            f"{len(short)} of the {len(documents)} documents of {target!r} are shorter than {_SHORT} characters (first "
            f"{short[0]!r}), where most claims read 128 tokens of each: give longer texts."
        )
    return said


def _n(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
