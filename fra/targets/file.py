"""Target files: what stands in one, and how a name is found. Reading one imports no torch, so that tests are collected
without it.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from fra.dictionaries.hooks import is_head_output, layer_of
from fra.errors import FraError
from fra.targets.processing import NAMED

_BESIDE = Path(__file__).resolve().parents[2]
_FOLDER = Path("fixtures") / "targets"
_TOO_LARGE = 1_000_000
SOURCES = ("name", "document", "folder")
"""The words that `text.sources` may say; anything else is a pattern."""

Text = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]
Hook = Annotated[str, StringConstraints(pattern=r"^blocks\.\d{1,6}\.[a-z0-9_.]+$")]
Head = Annotated[str, StringConstraints(pattern=r"^L\d{1,6}H\d{1,6}$")]
Count = Annotated[int, Field(ge=1, le=10_000)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ProcessingTable(_Table):
    """TransformerLens' weight processing, flag by flag; a flag that is not named is off."""

    fold_ln: bool = False
    center_writing_weights: bool = False
    center_unembed: bool = False
    fold_value_biases: bool = False


def _by_name(value: Any) -> Any:
    """The flags of a processing that has a name."""
    if isinstance(value, str) and value in NAMED:
        return ProcessingTable(**dict.fromkeys(NAMED[value], True))
    if isinstance(value, dict):
        return value
    raise ValueError('say "none", "folded", or a table of flags')


def check_devices(device_map: Mapping[str, str | int]) -> None:
    """Raises ValueError for devices that no hook could be read on: weights that are loaded only while they are used."""
    devices = {f"cuda:{device}" if isinstance(device, int) else device for device in device_map.values()}
    for device in sorted(devices):
        if not re.fullmatch(r"cpu|cuda:\d+", device):
            raise ValueError(f"device_map names the device {device!r}: say cpu, cuda:N or N, the number of a GPU")
    if not devices or ("cpu" in devices and len(devices) > 1):
        raise ValueError(
            "device_map must name devices, GPUs alone or the CPU alone: beside a GPU, accelerate keeps on the CPU what "
            "it loads only while it is used, and its weights cannot be read"
        )


class ModelTable(_Table):
    """`[model]`: a Hugging Face directory, a name on the hub, or a GGUF file."""

    path: Text | None = None
    """A Hugging Face directory, relative to the target file."""
    gguf: Text | None = None
    """A GGUF file, relative to the target file, or to what `package` installs."""
    package: Text | None = None
    """An installed distribution that has the GGUF file, by its name on the package index."""
    name: Text | None = None
    """A name on the hub."""
    revision: Text | None = None
    dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None
    """Precision in memory; float32 where it is not given."""
    device_map: Literal["auto", "balanced", "sequential"] | dict[str, str | int] | None = None
    """For a model that does not fit one device: how accelerate is to lay it over the GPUs, or modules of the Hugging
    Face model and their devices ("" for what is not named). None: all of it on one device.
    """
    processing: Annotated[ProcessingTable, BeforeValidator(_by_name)] | None = None
    """Weight processing; where it is not given, what the dictionaries' metadata says."""
    prepend_bos: bool | None = None
    """Whether documents begin with BOS; where it is not given, what the dictionaries' metadata says, else yes."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelTable:
        if sum(source is not None for source in (self.path, self.name, self.gguf)) != 1:
            raise ValueError("give either path (a directory), name (on the hub) or gguf (a file)")
        if self.revision is not None and self.name is None:
            raise ValueError("revision goes with name alone")
        if self.package is not None and self.gguf is None:
            raise ValueError("package goes with gguf, which names a file of it")
        if isinstance(self.device_map, dict):
            check_devices(self.device_map)
        return self

    @property
    def source(self) -> str:
        """Where the model comes from, as the target file says it."""
        given = self.path or self.name or self.gguf or ""
        return given if self.package is None else f"{self.package}: {given}"

    @property
    def flags(self) -> frozenset[str] | None:
        """The processing flags that are on, or None where the target does not say."""
        if self.processing is None:
            return None
        return frozenset(flag for flag, on in self.processing.model_dump().items() if on)


class DictionaryTable(_Table):
    """`[[dictionary]]`: a SAELens directory, or a release of SAELens; or a crosscoder, of which the model is a slot."""

    hook: Hook
    """The hook at which it is used, which must be the one at which it was trained."""
    path: Text | None = None
    """A SAELens directory (cfg.json, sae_weights.safetensors), or a crosscoder's (crosscoder.json,
    crosscoder.safetensors), relative to the target file.
    """
    release: Text | None = None
    sae_id: Text | None = None
    kind: Literal["sae", "crosscoder"] = "sae"
    slot: int | None = Field(default=None, ge=0)
    """Of a crosscoder: the slot that is this model at `hook`."""
    models: dict[str, Text] = Field(default={})
    """Of a crosscoder: Hugging Face directories of the other slots' models, by the names that the slots have."""
    accept_mismatch: bool = False
    """Whether it is used even where its metadata names another hook, or where it fits poorly or better elsewhere; the
    ledger's header then says so.
    """

    @model_validator(mode="after")
    def _crosscoder(self) -> DictionaryTable:
        if self.kind == "crosscoder" and (self.slot is None or self.path is None):
            raise ValueError("a crosscoder needs its path (a directory) and slot (which of its slots this model is)")
        if self.kind == "sae" and (self.slot is not None or self.models):
            raise ValueError('slot and models go with kind = "crosscoder"')
        return self

    @model_validator(mode="after")
    def _one_source(self) -> DictionaryTable:
        if (self.release is None) != (self.sae_id is None):
            raise ValueError("release and sae_id go together")
        if (self.path is None) == (self.release is None):
            raise ValueError("give either path (a directory) or release with sae_id")
        return self


class StudyTable(DictionaryTable):
    """`[[study]]`: one point of an arm in a comparison of ways to train a dictionary of head outputs."""

    arm: Literal[
        "dense",
        "block-width",
        "block-parameters",
        "block-plain",
        "block-no-head-scale",
        "block-no-tied-init",
        "block-no-zero-biases",
        "dense-l1",
        "block-l1",
        "block-l1-unit",
        "dense-width",
    ]
    """Arms are compared at one hook; the claims of chapter B say what each one is."""
    run: int = Field(default=0, ge=0)
    """Training run that the dictionary comes from: arms of one run saw the same tokens in the same order."""


class HeadsTable(_Table):
    """`[heads]`: what is known of the heads, and from where."""

    known_tih: tuple[Head, ...] = Field(default=(), strict=False)
    """Token induction heads, as "L1H3"."""
    known_from: Text | None = None

    @model_validator(mode="after")
    def _sourced(self) -> HeadsTable:
        if self.known_tih and self.known_from is None:
            raise ValueError("known_from must say where known_tih is known from")
        return self


class TextTable(_Table):
    """`[text]`: what the target is measured on."""

    documents: Text
    """A directory of .txt files or one such file, relative to the target file, or the name of a dataset on the hub. One
    file is cut into documents.
    """
    sources: Text | None = None
    """Which documents are of one source, and resampled together. "name": those whose names differ only after the last
    hyphen (what holds where nothing is said); "document": each is its own; "folder": those of one folder, beneath
    `documents`; anything else is a regular expression that finds the source in a document's name (its first group, else
    the whole match).
    """
    separator: Text | None = None
    """What stands between the texts of one file; each is then a source of its own, unless `sources` says otherwise."""
    split: Text | None = None
    """Of a data set; "train" where it is not given."""
    column: Text | None = None
    """Of a data set; "text" where it is not given."""

    @model_validator(mode="after")
    def _pattern(self) -> TextTable:
        try:
            re.compile(self.sources or "")
        except re.error as error:
            raise ValueError(f"sources is none of {', '.join(SOURCES)}, and no regular expression ({error})") from error
        return self


class SizeTable(_Table):
    """`[size]`: static, so that tests are collected without loading the model."""

    n_layers: Count
    n_heads: Count


class TargetSpec(_Table):
    """A target file."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    allow_pickle_release: bool = False
    """Whether releases that exist only as pickles (which can run code when loaded) may be loaded from the hub."""
    model: ModelTable
    dictionary: tuple[DictionaryTable, ...] = Field(default=(), strict=False)
    seed: tuple[DictionaryTable, ...] = Field(default=(), strict=False)
    """`[[seed]]`: dictionaries of an attention input that differ from one another by their seed alone."""
    study: tuple[StudyTable, ...] = Field(default=(), strict=False)
    """Dictionaries that only the claims of chapter B read: several at one hook, unlike `dictionary`."""
    heads: HeadsTable = HeadsTable()
    text: TextTable
    size: SizeTable

    @model_validator(mode="after")
    def _consistent(self) -> TargetSpec:
        hooks = [entry.hook for entry in self.saes]
        for hook in hooks:
            if hooks.count(hook) > 1:
                raise ValueError(f"two dictionaries at {hook}")
        if any(entry.kind != "sae" for entry in (*self.seed, *self.study)):
            raise ValueError("a crosscoder is a [[dictionary]], none of [[seed]] or [[study]]")
        folders = [Path(str(entry.path)).name for entry in self.crosscoders]
        for folder in folders:
            if folders.count(folder) > 1:
                raise ValueError(f"two crosscoders in folders named {folder}: these names are what they are known by")
        studied = {entry.hook for entry in self.study}
        if len(studied) > 1:
            raise ValueError(f"the study compares dictionaries at one hook, and names {' and '.join(sorted(studied))}")
        if any(not is_head_output(hook) for hook in studied):
            raise ValueError(f"the study is of head outputs (attn.hook_z), not of {studied.pop()}")
        for hook in (*hooks, *(entry.hook for entry in (*self.crosscoders, *self.seed)), *studied):
            at = layer_of(hook)
            if at is not None and at >= self.size.n_layers:
                raise ValueError(f"the hook {hook} lies beyond the {self.size.n_layers} layers of [size]")
        for head in self.heads.known_tih:
            layer, index = map(int, head[1:].split("H"))
            if layer >= self.size.n_layers or index >= self.size.n_heads:
                raise ValueError(
                    f"the known head {head} lies outside the {self.size.n_layers} x {self.size.n_heads} heads of [size]"
                )
        return self

    @property
    def saes(self) -> tuple[DictionaryTable, ...]:
        """The dictionaries of SAELens, at most one a hook."""
        return tuple(entry for entry in self.dictionary if entry.kind == "sae")

    @property
    def crosscoders(self) -> tuple[DictionaryTable, ...]:
        """The crosscoders, any number a hook."""
        return tuple(entry for entry in self.dictionary if entry.kind == "crosscoder")

    @property
    def local(self) -> bool:
        """Whether model and dictionaries are all on this machine."""
        entries = (*self.dictionary, *self.seed, *self.study)
        return self.model.name is None and all(entry.path is not None for entry in entries)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that the file system refuses, as too long
        return False


def presets() -> dict[str, Path]:
    """The target files that a bare name finds: those of `./fixtures/targets`, then those beside the package."""
    found: dict[str, Path] = {}
    for folder in (_FOLDER, _BESIDE / _FOLDER):
        for file in sorted(folder.glob("*.toml")):
            found.setdefault(file.stem, file)
    return found


def find_target(name_or_path: str | Path) -> Path:
    """The target file: a path, then `./fixtures/targets/NAME.toml`, then the same beside the package. Raises FraError
    where there is none.
    """
    text = str(name_or_path)
    if _is_file(Path(text)):
        return Path(text).resolve()
    known = presets()
    if text in known:
        return known[text].resolve()
    if not known:
        raise FraError(
            f"there is no target {text[:200]!r}: no such file, and the presets (mini among them) are not part of the "
            "installed package; they are in fixtures/targets of fra's repository: work in a clone of it, give the path "
            "of a target file (CLONE/fixtures/targets/mini.toml), or make a target with fra.load(model, sae, texts)."
        )
    raise FraError(
        f"there is no target {text[:200]!r}: no such file, and none of that name in fixtures/targets (known there: "
        f"{', '.join(sorted(known))}); give a known name or the path of a target file."
    )


def _parse(file: Path) -> dict[str, Any]:
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise FraError(f"the target file {file} cannot be read: {error.strerror or error}.") from error
    if len(raw) > _TOO_LARGE:
        raise FraError(f"the target file {file} has {len(raw)} bytes: this is not a target file.")
    try:
        return tomllib.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise FraError(f"the target file {file} is not UTF-8 text (line {line}): save it as UTF-8.") from error
    except RecursionError as error:
        raise FraError(f"the target file {file} is nested too deeply to be a target file.") from error
    except ValueError as error:  # TOMLDecodeError, and what Python's own number parser refuses
        message = str(error)
        at = re.search(r"\(at line (\d+), column (\d+)\)$", message)
        last = raw.count(b"\n") + 1
        where = (
            f"line {at[1]}, column {at[2]}"
            if at
            else f"line {last}"
            if "end of document" in message
            else "line unknown"
        )
        what = re.sub(r"\s*\(at [^()]*\)$", "", message)
        line_at = raw.splitlines()[int(at[1]) - 1] if at and int(at[1]) <= raw.count(b"\n") + 1 else b""
        if b"\\" in line_at and ("\\" in what or "hex value" in what):
            what += "; in double quotes a backslash must be doubled: write paths with / or in single quotes"
        raise FraError(f"the target file {file} is not TOML ({where}): {what}.") from error


_WORDS = {
    "name": "must be letters, digits, dots, hyphens and underscores, at most 100, with a letter or digit first",
    "hook": "must be a hook of TransformerLens, as blocks.0.ln1.hook_normalized",
    "known_tih": "must name heads as L1H3 (layer 1, head 3)",
}
"""What a pattern asks for, by the key whose value it is."""
_LISTS = ("dictionary", "seed", "study")


def sentence(error: ValidationError) -> str:
    """The first complaint of pydantic as dotted key and reason, and how many more there are."""
    complaints = error.errors(include_url=False, include_context=False, include_input=False)
    first = min(complaints, key=lambda one: one["type"] != "extra_forbidden")  # a typo is why another key is missing
    key = ".".join(str(part) for part in first["loc"])
    named = next((str(part) for part in reversed(first["loc"]) if isinstance(part, str)), "")
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(named, known_keys(), n=1)
        what = "unknown key" + (f" (is {close[0]} meant?)" if close and close[0] != named else "")
    elif first["type"] == "missing":
        what = "missing"
    elif first["type"] == "string_pattern_mismatch" and named in _WORDS:
        what = _WORDS[named]
    elif first["type"] == "tuple_type":
        one = (
            f"each begins with [[{named}]], in two brackets" if named in _LISTS else 'write it in brackets, as ["..."]'
        )
        what = f"must be a list: {one}"
    else:
        what = first["msg"].removeprefix("Value error, ")
        what = what[:1].lower() + what[1:]
    more = f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""
    return f"{key[:200] + ': ' if key else ''}{what}{more}"


def known_keys() -> list[str]:
    """Every key that a target file may have."""
    tables = (TargetSpec, ModelTable, ProcessingTable, StudyTable, HeadsTable, TextTable, SizeTable)
    return sorted({key for table in tables for key in table.model_fields})


def read_target(name_or_path: str | Path) -> tuple[TargetSpec, Path]:
    """The target of that name or path, and the folder that its relative paths start from. Nothing is loaded.

    Raises FraError where there is none, with the line of a syntax error, and with the dotted key of a value that does
    not fit.
    """
    file = find_target(name_or_path)
    try:
        return TargetSpec.model_validate(_parse(file)), file.parent
    except ValidationError as error:
        raise FraError(f"the target file {file} does not fit: {sentence(error)}.") from error
