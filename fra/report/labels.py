"""Names that people or models gave to a dictionary's features, read from a file: Neuronpedia's export of explanations,
or a file of one's own.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fra.errors import FraError

_IDS, _TEXTS = ("feature", "index"), ("label", "description")
_FORMS = (
    'give Neuronpedia\'s export of explanations (JSON, or JSON lines, perhaps .gz), JSON as {"12": "label"}, or CSV '
    "with the header feature,label"
)


def read(file: Path, d_sae: int, page: str | None = None) -> dict[int, str]:
    """Labels by feature; of several for one feature the first.

    page: what Neuronpedia calls the dictionary, as "gpt2-small/6-att-kk", where that is known: an export that names
    another is refused. Raises FraError for a file that cannot be read, is no such file, or speaks of features that the
    dictionary does not have.
    """
    try:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except (OSError, EOFError) as error:
        raise FraError(f"the labels {file} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    except UnicodeDecodeError as error:
        raise FraError(f"the labels {file} are not UTF-8: save the file as UTF-8.") from error
    found: dict[int, str] = {}
    for number, record in enumerate(_records(file, text), start=1):
        _check_source(file, record, page)
        feature = next((record[name] for name in _IDS if record.get(name) not in (None, "")), None)
        label = next((record[name] for name in _TEXTS if record.get(name) is not None), None)
        try:
            at = int(str(feature))
        except ValueError:
            at = -1
        if at < 0 or not isinstance(label, str):
            raise FraError(f"entry {number} of the labels {file} has no feature number with a label: {_FORMS}.")
        if at >= d_sae:
            raise FraError(
                f"the labels {file} speak of feature {at}, and the dictionary has {d_sae} features: give labels of "
                "this dictionary."
            )
        if label.strip():
            found.setdefault(at, " ".join(label.split()))
    if not found:
        raise FraError(f"the labels {file} hold no label: {_FORMS}.")
    return found


def _records(file: Path, text: str) -> Iterable[Mapping[str, Any]]:
    """The entries of a file, in whichever of the forms it is."""
    head = text.lstrip()[:1]
    if head not in ("{", "["):
        table = csv.DictReader(io.StringIO(text))
        named = [name.strip().lower() for name in table.fieldnames or ()]
        if not set(_IDS) & set(named) or not set(_TEXTS) & set(named):
            raise FraError(f"the labels {file} are neither JSON nor CSV with the header feature,label: {_FORMS}.")
        table.fieldnames = named
        return list(table)
    try:
        value = json.loads(text)
    except ValueError:
        try:
            value = [json.loads(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError) as error:
            raise FraError(f"the labels {file} are no JSON ({error}): {_FORMS}.") from error
    except RecursionError as error:
        raise FraError(f"the labels {file} are nested too deep: {_FORMS}.") from error
    if isinstance(value, dict):
        value = value.get("explanations", value)
    if isinstance(value, dict):
        value = [value] if set(_IDS) & set(value) else [{"feature": k, "label": v} for k, v in value.items()]
    if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
        raise FraError(f"the labels {file} hold no list of labels: {_FORMS}.")
    return value


def _check_source(file: Path, record: Mapping[str, Any], page: str | None) -> None:
    named = f"{record.get('modelId')}/{record.get('layer')}"
    if page is not None and "modelId" in record and "layer" in record and named != page:
        raise FraError(
            f"the labels {file} are of {named!r} and the dictionary is {page!r} on Neuronpedia: give its own export."
        )
