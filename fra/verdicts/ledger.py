"""The ledger: every verdict of a run as JSON (schema 1), written whole or not at all, and read with one sentence for
whatever is wrong.

```
{"schema": 1,
 "header": {target, model, versions, commit, device, seed, started, seconds, options, claims},
 "verdicts": [{claim, target, head, verdict, effect, low, high, bar, p, q, n, digest, detail}, ...]}
```

Rows are sorted by claim and head (a family's own row, head null, first). Numbers are JSON numbers or null: what is not
finite is null. effect, low, high, bar and p are those of the condition that decided, which `detail` names (`decided`;
`met`: how many conditions hold, of how many). `detail` also holds `reason`, `power`, `candidates` (each with its
conditions), `best`, the flags `exploratory`, `known`, `overturned` and `borderline`, and whatever the measurement
wishes to show. In `candidates`, what is null or false is left out, and the first candidate alone gives bar and
side, which all share; a ledger that gives everything is read as the same.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    model_validator,
)

from fra.errors import FraError
from fra.verdicts.claim import Claim, Condition, Evidence, Kind, parse_head
from fra.verdicts.files import write_text
from fra.verdicts.judge import Verdict, judge

if TYPE_CHECKING:
    import pandas as pd

Word = Literal["SUPPORTED", "REFUTED", "INCONCLUSIVE", "CANNOT_RUN", "BROKEN", "NOT_APPLICABLE"]
WORDS: tuple[Word, ...] = get_args(Word)
"""The judge's outcomes, and BROKEN: the measurement raised."""
COUNTED = tuple(word for word in WORDS if word != "NOT_APPLICABLE")
"""What is counted: heads that a claim is not about are not missing anywhere."""
KINDS: tuple[Kind, ...] = get_args(Kind)
PLURAL: dict[Kind, str] = {"finding": "findings", "identity": "identities", "control": "controls"}

_TOO_LARGE = 512 * 2**20
_TOO_DEEP = 40


def _is_head(name: str) -> str:
    parse_head(name)
    return name


Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
Head = Annotated[str, AfterValidator(_is_head)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ClaimNote(_Table):
    """What a reader needs to know of a claim: it stands in the header, once."""

    title: str
    h0: str
    kind: Kind
    condition: str
    """Name of the headline condition."""
    bar: Number
    above: bool
    level: Share
    statistic: str
    stimuli: list[str]
    n: int
    exploratory: bool
    """Not registered when it was measured."""


class DictionaryNote(_Table):
    """A dictionary that the run had."""

    hook: str
    role: str
    """"dictionary", "seed" or "study"."""
    source: str
    """Its path as the target file gives it, or release and id."""
    sha256: Digest | None
    d_sae: int | None
    l0: Number | None
    """Features live at a position of the target's own text, on average; null where it was not measured."""
    explained_variance: Number | None
    loss_recovered: Number | None = None
    """Of the loss that zeros at the hook cost, the share that the dictionary saves; null where zeros cost nothing or it
    was not measured.
    """


class TextNote(_Table):
    """The text that the run had."""

    documents: str
    n_documents: int
    n_sources: int
    """Independent sources."""
    sha256: Digest
    first_tokens: list[str]
    """How the first document begins, BOS with it."""


class Header(_Table):
    """Where the numbers come from."""

    target: Name
    model: str | None
    """Name or path of the model, and the fingerprint of weights, dictionaries and text."""
    versions: dict[str, str]
    commit: str | None
    """With "-dirty" where the checkout had changes; null outside one."""
    device: str
    seed: str
    """How every seed is made; there is no other source of chance."""
    started: str
    """UTC, ISO 8601."""
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    options: dict[str, JsonValue] = {}
    claims: dict[str, ClaimNote] = {}
    dictionaries: list[DictionaryNote] = []
    text: TextNote | None = None
    """Both absent where nothing was measured on the target."""
    remarks: list[str] = []
    """What was to be known of the target before anything was measured: too few sources, short or repeated text,
    dictionaries that were accepted although they may not fit.
    """
    partial: str | None = None
    """Why rows that the claims could give are missing (a selection, an interruption); null where none is."""


class _Shown(_Table):
    effect: Number | None = None
    low: Number | None = None
    high: Number | None = None
    bar: Number | None = None
    above: bool | None = None
    p: Share | None = None
    p_refute: Share | None = None
    power: Share | None = None
    needed: int | None = None
    holds: bool = False
    fails: bool = False


class _Known(_Table):
    """The names in `detail` that have a meaning here; every other one is the measurement's."""

    reason: str = ""
    power: Number | None = None
    decided: str = ""
    met: str = ""
    best: str | None = None
    candidates: dict[str, dict[str, _Shown]] = {}
    exploratory: bool = False
    known: str = ""
    overturned: str = ""
    borderline: str = ""


def _detail(detail: dict[str, JsonValue]) -> dict[str, JsonValue]:
    ours = _Known.model_validate({name: detail[name] for name in _Known.model_fields if name in detail})
    if len({tuple(conditions) for conditions in ours.candidates.values()}) > 1:
        raise ValueError("the candidates differ in their conditions")
    for conditions in list(ours.candidates.values())[:1]:
        for name, shown in conditions.items():
            if shown.bar is None or shown.above is None:
                raise ValueError(f"the condition {name!r} of the first candidate has no bar or no side")
    return detail | {"candidates": _compact(ours.candidates)} if "candidates" in detail else detail


def _compact(candidates: Mapping[str, Mapping[str, _Shown]]) -> dict[str, JsonValue]:
    """The conditions of every candidate without what is null or false; bar and side, which are the claim's, at the
    first: a row may have fifty candidates.
    """
    found: dict[str, JsonValue] = {}
    for candidate, conditions in candidates.items():
        said = ("bar", "above") if found else ()
        found[candidate] = {
            name: {
                key: value
                for key, value in shown.model_dump().items()
                if key not in said and (key == "above" or (value is not None and value is not False))
            }
            for name, shown in conditions.items()
        }
    return found


class Row(_Table):
    """One verdict."""

    claim: Name
    target: Name
    head: Head | None
    verdict: Word
    effect: Number | None
    low: Number | None
    high: Number | None
    bar: Number | None
    p: Share | None
    q: Share | None
    n: Annotated[int, Field(ge=0)] | None
    digest: Digest
    detail: Annotated[dict[str, JsonValue], AfterValidator(_detail)]

    @property
    def judged(self) -> bool:
        """Whether the claim was asked of this head and answered."""
        return self.verdict in ("SUPPORTED", "REFUTED", "INCONCLUSIVE")

    @property
    def key(self) -> tuple[str, int, int]:
        """Rows are sorted by claim, then layer, then head; a family's own row comes first."""
        return (self.claim, *((-1, -1) if self.head is None else parse_head(self.head)))


class Ledger(_Table):
    """A whole run. Rows are kept sorted; two for the same claim and head are refused."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    header: Header
    verdicts: list[Row]

    def kind_of(self, claim: str) -> Kind:
        """What a claim is; a finding where the header does not say."""
        note = self.header.claims.get(claim)
        return "finding" if note is None else note.kind

    def by_kind(self) -> dict[Kind, list[Row]]:
        """The rows of each kind of claim that there is: findings, then identities, then controls."""
        rows = {kind: [row for row in self.verdicts if self.kind_of(row.claim) == kind] for kind in KINDS}
        return {kind: own for kind, own in rows.items() if own}

    def to_frame(self) -> "pd.DataFrame":
        """The rows as a pandas table (`fra.verdicts.frames.frame` has its columns)."""
        from fra.verdicts.frames import frame

        return frame(self)

    @model_validator(mode="after")
    def _sorted(self) -> "Ledger":
        self.verdicts.sort(key=lambda row: row.key)
        for one, other in zip(self.verdicts, self.verdicts[1:], strict=False):
            if one.key == other.key:
                raise ValueError(f"two verdicts for {one.claim} at {one.head or 'the family'}")
        return self


def clean(value: Any, where: str = "detail") -> Any:
    """The value in JSON's own types: numpy and torch scalars and arrays become numbers and lists, data frames lists of
    records, what is not finite null.

    Raises FraError, naming the key, for anything else.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return clean(value.value, where)
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair is no text
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {clean(str(k), where): clean(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v, f"{where}[{k}]") for k, v in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return [clean(v, where) for v in sorted(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "columns") and hasattr(value, "to_dict"):
        return clean(value.to_dict(orient="records"), where)
    if hasattr(value, "tolist"):
        return clean(value.tolist(), where)
    raise FraError(
        f"{where} holds a {type(value).__name__}; a ledger keeps numbers, strings, lists, mappings and arrays"
    )


def _shown(condition: Condition, level: float) -> dict[str, Any]:
    fields = ("effect", "low", "high", "bar", "above", "p", "p_refute", "power", "needed")
    return {name: getattr(condition, name) for name in fields} | {
        "holds": condition.holds(level),
        "fails": condition.fails(level),
    }


def candidates_of(row: Row) -> dict[str, dict[str, dict[str, Any]]]:
    """The conditions of a row's candidates, by name, with everything that the ledger leaves out."""
    found = _Known.model_validate({"candidates": row.detail.get("candidates", {})}).candidates
    first = next(iter(found.values()), {})
    return {
        candidate: {
            name: shown.model_dump() | {"bar": first[name].bar, "above": first[name].above}
            for name, shown in conditions.items()
        }
        for candidate, conditions in found.items()
    }


def row_of(verdict: Verdict, target: str, **flags: Any) -> Row:
    """The ledger's row for a verdict. `flags` (exploratory, known, overturned) join `detail`.

    Raises FraError where the evidence's own detail uses a name that the ledger needs.
    """
    evidence, claim = verdict.evidence, verdict.evidence.claim
    detail: dict[str, Any] = {"reason": verdict.reason} | flags
    power = evidence.power if verdict.decided is None or evidence.power is not None else verdict.decided.power
    if power is not None:
        detail["power"] = power
    if evidence.candidates:
        detail["best"] = verdict.best
        if verdict.decided is not None:
            detail["decided"] = verdict.decided.name
            detail["met"] = "{} of {}".format(*verdict.met)
        detail["candidates"] = {
            name: {c.name: _shown(c, claim.level) for c in conditions}
            for name, conditions in evidence.candidates.items()
        }
    if taken := sorted((detail.keys() | _Known.model_fields.keys()) & evidence.detail.keys()):
        raise FraError(
            f"{claim.id} at {evidence.head or 'the family'}: the name {taken[0]!r} in detail is the ledger's own"
        )
    decided = verdict.decided
    numbers = dict.fromkeys(("effect", "low", "high", "p")) if decided is None else _shown(decided, claim.level)
    return Row(
        claim=claim.id,
        target=target,
        head=evidence.head,
        verdict=verdict.outcome.value,
        bar=claim.bar if decided is None else decided.bar,
        q=clean(evidence.q),
        n=int(evidence.n) if evidence.candidates or evidence.n else None,
        digest=claim.digest,
        detail=clean(detail | dict(evidence.detail)),
        **{name: clean(numbers[name]) for name in ("effect", "low", "high", "p")},
    )


def bare_row(claim: Claim, head: str | None, target: str, word: Word, reason: str, **flags: Any) -> Row:
    """A row without numbers: CANNOT_RUN or BROKEN before any evidence was there."""
    row = row_of(judge(claim, Evidence(claim=claim, head=head, cannot=reason)), target, **flags)
    return row.model_copy(update={"verdict": word})


def note_of(claim: Claim, *, exploratory: bool) -> ClaimNote:
    """What the header says of a claim."""
    shown = {
        name: getattr(claim, name)
        for name in ("title", "h0", "kind", "condition", "bar", "above", "level", "statistic", "n")
    }
    return ClaimNote(**shown, stimuli=list(claim.stimuli), exploratory=exploratory)


def dumps(ledger: Ledger) -> str:
    """The ledger as JSON text, a line a row."""
    data = ledger.model_dump(mode="json", by_alias=True)
    header = json.dumps(data["header"], indent=1, ensure_ascii=False, allow_nan=False)
    rows = (json.dumps(row, separators=(",", ":"), ensure_ascii=False, allow_nan=False) for row in data["verdicts"])
    return f'{{"schema": {data["schema"]},\n"header": {header},\n"verdicts": [\n' + ",\n".join(rows) + "\n]}\n"


def write(ledger: Ledger, path: Path | str) -> None:
    """Write the ledger, whole or not at all. Raises FraError where the path cannot be written."""
    write_text(dumps(ledger), Path(path))


def read(path: Path | str) -> Ledger:
    """Read a ledger. Raises FraError, in one sentence, for whatever is wrong with the file."""
    try:
        if Path(path).stat().st_size > _TOO_LARGE:
            raise FraError(f"{path} is larger than any ledger ({_TOO_LARGE >> 20} MiB)")
        raw = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        if isinstance(error, FraError):
            raise
        raise FraError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return loads(raw, str(path))


def loads(raw: bytes | str, name: str = "the ledger") -> Ledger:
    """The ledger in a JSON text; `name` is what errors call it. Raises FraError."""
    try:
        # json takes a byte order mark off bytes, and off no text
        data = json.loads(raw.removeprefix("\ufeff") if isinstance(raw, str) else raw, parse_constant=_no_constant)
        if not isinstance(data, dict):
            raise FraError(f"{name} is JSON but no ledger: a ledger is an object with schema, header and verdicts")
        schema = data.get("schema")
        if type(schema) is not int or schema != 1:
            newer = ": it is newer, read it with the fra that wrote it" if type(schema) is int and schema > 1 else ""
            raise FraError(f"{name} has the schema {str(schema)[:40]!r}; this fra reads schema 1{newer}")
        if _depth(data) > _TOO_DEEP:
            raise FraError(f"{name} is nested more than {_TOO_DEEP} levels deep: this is not a ledger")
        json.dumps(data, ensure_ascii=False).encode()  # half a surrogate pair could be read but never shown
        return Ledger.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden" and isinstance(data["header"], dict):
            by = str(dict(data["header"].get("versions") or {}).get("fra", "another"))[:40]
            said = (
                f"{name} has the key {key[:200]!r}, which this fra does not know; fra {by} wrote it: read it with that"
            )
            raise FraError(said) from error
        what = re.sub(r"\s+", " ", first["msg"].removeprefix("Value error, "))
        if later := _newer(data):
            said = f"{name} is newer than this fra, {version('fra')}: it was written by {later} ({key[:200]}: {what})"
            raise FraError(f"{said}; read it with that") from error
        raise FraError(f"{name} is not a ledger: {key[:200] or 'as a whole'}: {what}") from error
    except RecursionError as error:
        raise FraError(f"{name} is nested too deeply to be a ledger") from error
    except FraError:
        raise
    except ValueError as error:  # JSONDecodeError, bytes that are not UTF-8, a number of ten thousand digits
        raise FraError(f"{name} is not JSON: {str(error)[:200]}") from error


def _newer(data: dict[str, Any]) -> str | None:
    """The fra that a ledger says it was written by, where that is a later one."""
    header = data.get("header")
    versions = header.get("versions") if isinstance(header, dict) else None
    by = versions.get("fra") if isinstance(versions, dict) else None
    if not isinstance(by, str):
        return None
    theirs, own = ([int(part) for part in re.findall(r"\d{1,9}", text)[:3]] for text in (by, version("fra")))
    return by[:40] if theirs > own else None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number; a ledger writes null")


def _depth(value: Any) -> int:
    deep, level = 0, [value]
    while level:
        deep += 1
        level = [v for x in level if isinstance(x, (dict, list)) for v in (x.values() if isinstance(x, dict) else x)]
    return deep
