"""A target: a model with its dictionaries and its text, by the name of a preset or the path of a target file."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fra.dictionaries.hooks import LayerHooks, is_output, layer_of, output_layer_of
from fra.errors import CannotLoad, FraError
from fra.targets.documents import Document, read_documents
from fra.targets.file import DictionaryTable, TargetSpec, find_target, read_target
from fra.targets.processing import declared_by, describe, settle
from fra.verdicts.shown import as_html

if TYPE_CHECKING:
    import torch
    from jaxtyping import Int
    from torch import Tensor

    from fra.core.weights import Model
    from fra.dictionaries.crosscoder import Placed

_DTYPES = ("float32", "float64", "bfloat16", "float16")
_LOADED: weakref.WeakKeyDictionary[Any, Target] = weakref.WeakKeyDictionary()
"""The targets of models that were loaded from a target file: another process loads them so, too."""


class Dictionaries(Mapping[str, Any]):
    """{hook name: sae_lens SAE} of a target, each loaded and checked once, when it is first asked for."""

    def __init__(self, target: Target):
        self._target = target
        self._entries = {entry.hook: entry for entry in target.spec.saes}
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, hook: str) -> Any:
        if hook not in self._loaded:
            self._loaded[hook] = self._target._load_dictionary(self._entries[hook])
        return self._loaded[hook]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, hook: object) -> bool:
        return hook in self._entries


class Target:
    """A model, its dictionaries and its text; model and dictionaries are loaded when first asked for. Made by
    `load_target`.
    """

    def __init__(self, spec: TargetSpec, folder: Path, device: str, dtype: str):
        self.spec = spec
        self.folder = folder
        """Relative paths of the spec start here."""
        self.device = device
        self.dtype = dtype
        self.file: Path | None = None
        """The target file; None where there is none."""
        self.model_folder: Path | None = None
        """The Hugging Face directory, given, fetched or made of a GGUF file; None for a model in TransformerLens' own
        format.
        """
        self._tried: frozenset[str] | None = None
        self.dictionaries: Mapping[str, Any] = Dictionaries(self)

    def __repr__(self) -> str:
        hooks = ", ".join(self.dictionaries) or "no dictionaries"
        size = f"{self.n_layers} layers of {self.n_heads} heads"
        return f"Target({self.name!r}, {size}; {hooks}; {self.device} {self.dtype})"

    def _repr_html_(self) -> str:
        facts = {
            "model": self.spec.model.source,
            "size": f"{self.n_layers} layers of {self.n_heads} heads",
            "dictionaries": ", ".join(self.dictionaries) or "none",
            "resolvable": f"{len(self.resolvable)} heads",
            "text": self.spec.text.documents,
            "on": f"{self.device}, {self.dtype}",
        }
        return as_html(f"Target {self.name}", facts)

    @property
    def name(self) -> str:
        """The target's name, as known.toml and the ledger use it."""
        return self.spec.name

    @property
    def n_layers(self) -> int:
        """Layers, as the target file states them."""
        return self.spec.size.n_layers

    @property
    def n_heads(self) -> int:
        """Query heads of a layer, as the target file states them."""
        return self.spec.size.n_heads

    @property
    def heads(self) -> tuple[str, ...]:
        """All heads, as "L1H3", by layer."""
        return tuple(f"L{layer}H{head}" for layer in range(self.n_layers) for head in range(self.n_heads))

    @property
    def resolvable(self) -> tuple[str, ...]:
        """The heads whose layer has a dictionary at its attention input: those that `fra.resolve` can take apart."""
        return tuple(head for head in self.heads if has_dictionary(self, int(head[1:].split("H")[0])))

    @property
    def known_tih(self) -> tuple[str, ...]:
        """The heads that the target file lists as token induction heads."""
        return self.spec.heads.known_tih

    def _path(self, relative: str) -> Path:
        return (self.folder / Path(relative).expanduser()).resolve()

    def folder_of(self, entry: DictionaryTable) -> Path:
        """The directory of a dictionary that is on this machine. Raises FraError for one of a release."""
        if entry.path is None:
            raise FraError(
                f"the dictionary at {entry.hook!r} is of the release {entry.release!r} and has no directory."
            )
        return self._path(entry.path)

    def files_of(self, entry: DictionaryTable) -> list[Path]:
        """Configuration and weights of a dictionary that is on this machine, of a crosscoder those of the models beside
        it too. Raises FraError for one of a release.
        """
        from fra.checkpoints import weights

        folder = self.folder_of(entry)
        if entry.kind == "sae":
            return [folder / weights.SAE_CONFIG, folder / weights.SAE_WEIGHTS]
        files = [folder / weights.CROSSCODER_CONFIG, folder / weights.CROSSCODER_WEIGHTS]
        for name, path in sorted(entry.models.items()):
            files += [self._path(path) / "config.json", *weights.model_files(self._path(path), f"the model {name!r}")]
        return files

    @cached_property
    def _metadata(self) -> dict[str, Mapping[str, Any]]:
        """Metadata of every dictionary, without its weights where the target does not need them."""
        from fra.checkpoints.hub import dictionary_metadata
        from fra.checkpoints.weights import SAE_CONFIG, read_json

        found: dict[str, Mapping[str, Any]] = {}
        for entry in self.spec.saes:
            if entry.path is not None:
                config = read_json(self._path(entry.path) / SAE_CONFIG, f"the dictionary at {entry.hook!r}")
                metadata = config.get("metadata", config)  # SAELens before version 6 kept it flat
                found[entry.hook] = metadata if isinstance(metadata, dict) else {}
            elif self.spec.model.flags is None and entry.release is not None and entry.sae_id is not None:
                found[entry.hook] = dictionary_metadata(
                    entry.release, entry.sae_id, allow_pickle=self.spec.allow_pickle_release
                )
        return found

    @cached_property
    def processing(self) -> frozenset[str]:
        """TransformerLens' processing flags that are on: as the target file says, else as the dictionaries do. Raises
        FraError where nobody says, or where only dictionaries say it and disagree.
        """
        if self._tried is not None:
            return self._tried
        return settle(self.spec.model.flags, {hook: declared_by(metadata) for hook, metadata in self._metadata.items()})

    def named_hook(self, hook: str) -> str | None:
        """The hook that the metadata of the dictionary at `hook` names; None where it names none. That of a release is
        taken to name its own.
        """
        told = self._metadata.get(hook, {"hook_name": hook})
        named = told.get("hook_name") or told.get("hook_point")  # as SAELens before version 6 called it
        return None if named is None else str(named)

    @property
    def accepted(self) -> frozenset[str]:
        """Hooks of the dictionaries that the target file accepts whatever their metadata says and however they fit."""
        return frozenset(entry.hook for entry in self.spec.dictionary if entry.accept_mismatch)

    @cached_property
    def prepend_bos(self) -> bool:
        """Whether documents begin with BOS: as the target says, else as the local dictionaries were trained, else
        yes.
        """
        if self.spec.model.prepend_bos is not None:
            return self.spec.model.prepend_bos
        told = {
            metadata["prepend_bos"]
            for metadata in self._metadata.values()
            if isinstance(metadata.get("prepend_bos"), bool)
        }
        if len(told) > 1:
            raise FraError(
                f"the dictionaries of {self.name!r} disagree on prepend_bos: set model.prepend_bos in the target file."
            )
        return told.pop() if told else True

    @cached_property
    def model(self) -> Model:
        """The model, as TransformerBridge or HookedTransformer. Raises CannotLoad where the hub is not reached,
        FraError for broken weights.
        """
        from fra.targets.loading import load_target_model

        model = load_target_model(self.spec, self.model_folder, self.device, self.dtype, self.processing)
        model.cfg.default_prepend_bos = self.prepend_bos  # so that the model's own to_tokens does as `tokens` does
        if self.spec.model.device_map is not None:
            self.device = str(next(model.parameters()).device)  # where documents go in
        if self.file is not None:
            _LOADED[model] = self
        return model

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own tokenizer, as its files have it. Raises FraError where there is none."""
        if self.model_folder is None:
            return self.model.tokenizer
        from fra.targets.tokens import load_tokenizer

        return load_tokenizer(self.model_folder, self.name)

    @property
    def bos(self) -> int | None:
        """The token that documents begin with, or None where they begin with none."""
        if not self.prepend_bos:
            return None
        token = self.tokenizer.bos_token_id
        if token is None:
            raise FraError(
                f"the tokenizer of {self.name!r} has no BOS token: set model.prepend_bos = false in the target file."
            )
        return int(token)

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """Token ids of a text, without BOS, of any length or the first `limit`. A special token that the text spells is
        text.
        """
        from fra.targets.tokens import encode

        return encode(self.tokenizer, text, limit)

    def tokens(self, text: str, longest: int | None = None) -> Int[Tensor, " pos"]:
        """Token ids of a document: BOS where the target prepends it, then the text, cut to `longest` ids and to the
        model's context.

        Raises FraError for an id that the model's embedding does not have.
        """
        import torch

        start = [] if self.bos is None else [self.bos]
        n_ctx, d_vocab = int(self.model.cfg.n_ctx), int(self.model.cfg.d_vocab)
        length = n_ctx if longest is None else min(longest, n_ctx)
        ids = (start + self.encode(text, max(0, length - len(start))))[:length]
        beyond = [token for token in ids if token >= d_vocab]
        if beyond:
            raise FraError(
                f"the tokenizer of {self.name!r} makes the id {beyond[0]} of the text {text[:40]!r}, and the model's "
                f"embedding has {d_vocab}: this is not the model's own tokenizer."
            )
        return torch.tensor(ids, dtype=torch.long)

    def _load_dictionary(self, entry: DictionaryTable) -> Any:
        """The dictionary of an entry of the target file. Raises FraError for one that was trained elsewhere."""
        from fra.targets.loading import load_dictionary

        path = None if entry.path is None else self._path(entry.path)
        device, allowed = self._device_of(entry.hook), self.spec.allow_pickle_release
        return load_dictionary(entry, path, device, self.dtype, allow_pickle=allowed)

    def _device_of(self, hook: str) -> str:
        """Where a dictionary goes: to its layer, which of a model on several devices is known when it is loaded."""
        layer = layer_of(hook)
        if self.spec.model.device_map is None or layer is None:
            return self.device
        return str(next(self.model.blocks[layer].parameters()).device)

    @cached_property
    def crosscoders(self) -> Mapping[str, Placed]:
        """The target's crosscoders by the names of their folders, each where this model is one of its slots, with the
        models of the others. Raises FraError for what does not fit.
        """
        from fra.targets.loading import load_crosscoder

        found = {}
        for entry in self.spec.crosscoders:
            folder, models = self.folder_of(entry), {name: self._path(path) for name, path in entry.models.items()}
            found[folder.name] = load_crosscoder(entry, folder, models, self.device, self.dtype, self.processing)
        return found

    def study(self, arm: str, run: int = 0) -> list[Any]:
        """The dictionaries of one arm of the target's study in one training run, as the target file orders them; none
        where it has none. Raises FraError as for any dictionary.
        """
        return [self._load_dictionary(entry) for entry in self.spec.study if (entry.arm, entry.run) == (arm, run)]

    def runs(self, arm: str) -> list[int]:
        """The training runs that the target's study has of an arm."""
        return sorted({entry.run for entry in self.spec.study if entry.arm == arm})

    def dictionary_for(self, layer: int) -> tuple[str, Any]:
        """Hook name and dictionary of the attention input of `layer`. Raises CannotLoad where the target has none."""
        hook = self.hook_for(layer)
        return hook, self.dictionaries[hook]

    def hook_for(self, layer: int) -> str:
        """The hook at which the target has a dictionary of the attention input of `layer`, without loading it. Raises
        CannotLoad where it has none, FraError for a layer that the model does not have.
        """
        if not 0 <= layer < self.n_layers:
            raise FraError(f"layer {layer} is out of range: {self.name!r} has {self.n_layers} layers.")
        inputs = LayerHooks(layer).inputs()
        for hook in inputs:
            if hook in self.dictionaries:
                return hook
        kinds = {LayerHooks(layer).z: "head outputs", LayerHooks(layer).attn_out: "what attention writes"}
        outputs = [f" (that at {hook} is one of {kind})" for hook, kind in kinds.items() if hook in self.dictionaries]
        other = outputs[0] if outputs else ""
        raise CannotLoad(
            f"{self.name!r} has no dictionary at the attention input of "
            f"layer {layer}{other}: give one at {' or '.join(inputs)}."
        )

    @property
    def seeds(self) -> dict[str, int]:
        """How many dictionaries that differ by their seed alone the target declares ([[seed]]), by hook."""
        hooks = [entry.hook for entry in self.spec.seed]
        return {hook: hooks.count(hook) for hook in dict.fromkeys(hooks)}

    def seed_dictionaries(self, hook: str) -> list[Any]:
        """The dictionaries of `seeds` at a hook, loaded and checked anew, in the order of the target file."""
        return [self._load_dictionary(entry) for entry in self.spec.seed if entry.hook == hook]

    def documents(self) -> list[Document]:
        """The target's text, by name. Raises FraError for a folder without text, an empty text, one that is not UTF-8,
        or sources that cannot be told.
        """
        return read_documents(self.name, self.spec.text, self._path(self.spec.text.documents))

    def remarks(self) -> list[str]:
        """What is to be known of the target's text before anything is measured on it, in sentences: too few sources,
        short or repeated documents. Raises FraError where all documents are one text.
        """
        from fra.targets.remarks import remarks

        text = self.spec.text
        cut = text.separator is None and self._path(text.documents).is_file()
        return remarks(self.name, self.documents(), text.sources, cut)

    def in_double(self) -> Target:
        """The same target in float64, loaded when first used. Raises FraError on a device that has no float64."""
        if self.device.startswith("mps"):
            raise FraError("this device has no float64: use the CPU.")
        double = Target(self.spec, self.folder, self.device, "float64")
        double.file, double.model_folder = self.file, self.model_folder
        return double

    def under(self, processing: frozenset[str]) -> Target:
        """The same target with its model's weights processed in a given way, loaded when first used, to be tried: what
        target file and dictionaries say of processing is not asked.
        """
        other = Target(self.spec, self.folder, self.device, self.dtype)
        other.model_folder, other._tried = self.model_folder, processing
        return other

    @cached_property
    def _fingerprint(self) -> str:
        from fra.checkpoints.weights import hash_files, hash_tensors, model_files

        digest = hashlib.sha256()
        digest.update(f"{self.dtype} {describe(self.processing)} bos={self.prepend_bos}\n".encode())
        if self.model_folder is None:
            hash_tensors(digest, self.model.state_dict())
        else:
            hash_files(digest, [self.model_folder / "config.json", *model_files(self.model_folder, self.name)])
        for entry in (*self.spec.dictionary, *self.spec.seed, *self.spec.study):
            digest.update(f"dictionary {entry.hook}\n".encode())
            if entry.path is None:
                hash_tensors(digest, self._load_dictionary(entry).state_dict())
            else:
                hash_files(digest, self.files_of(entry))
        table = self.spec.text
        if table.sources is not None:
            digest.update(f"sources {table.sources}\n".encode())
        for document in self.documents():
            digest.update(f"document {document.name} {len(document.text)}\n{document.text}".encode())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """sha256 of weights, dictionaries, text, precision and processing: what a cached measurement depends on
        besides code.
        """
        return self._fingerprint


def load_target(name_or_path: str | Path, *, device: str = "cpu", dtype: str | torch.dtype | None = None) -> Target:
    """A target by the name of a preset or the path of a target file, its files found and checked; model and
    dictionaries load when asked for.

    dtype: precision in memory; the target file's where it is not given, else float32.
    A target whose model and dictionaries are all local sets HF_HUB_OFFLINE=1 for this process where the variable is
    not set: no library asks the hub for what is here.

    A model that comes as a GGUF file is dequantised into the user's cache the first time (`fra.checkpoints.gguf`).

    >>> target = fra.load_target("mini")
    >>> hook, sae = target.dictionary_for(1)
    >>> hook
    'blocks.1.ln1.hook_normalized'
    >>> target.tokens("the cat").shape[0] == len(target.tokenizer.encode("the cat", add_special_tokens=False)) + 1
    True

    Raises FraError (one sentence) for an unknown target, a malformed file, weights that are missing, truncated,
    pickled or not finite, and weight processing that is unknown or contradictory; its subclass CannotLoad for what
    only the hub has, where the hub is not reached, and for a package or library that is not installed.
    """
    target = open_target(name_or_path, device=device, dtype=dtype)
    _ = target.processing  # settled now, so that a contradiction is found before anything is loaded
    return target


def open_target(name_or_path: str | Path, *, device: str = "cpu", dtype: str | torch.dtype | None = None) -> Target:
    """`load_target`, but that weight processing which is unknown or contradictory is said only when it is asked for."""
    spec, folder = read_target(name_or_path)
    precision = str(dtype).removeprefix("torch.") if dtype is not None else spec.model.dtype or "float32"
    if precision not in _DTYPES:
        raise FraError(f"there is no precision {precision!r}: use {', '.join(_DTYPES)}.")
    if spec.local:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    target = Target(spec, folder, device, precision)
    target.file = find_target(name_or_path)
    from fra.checkpoints.hub import fetch_model, is_transformer_lens_format
    from fra.checkpoints.weights import check_crosscoder_directory, check_dictionary_directory, check_model

    for entry in (*spec.saes, *spec.seed, *spec.study):
        if entry.path is not None:
            check_dictionary_directory(target._path(entry.path), f"the dictionary at {entry.hook!r}")
    for entry in spec.crosscoders:
        check_crosscoder_directory(target.folder_of(entry), f"the crosscoder at {entry.hook!r}")
        for name, path in entry.models.items():
            check_model(target._path(path), f"the model {name!r} of the crosscoder at {entry.hook!r}")
    what = f"the model of {spec.name!r}"
    if spec.model.path is not None:
        target.model_folder = target._path(spec.model.path)
    elif spec.model.gguf is not None:
        target.model_folder = _dequantised(target)
        what += f" (made of {spec.model.source}; without that folder it is made anew)"
    elif not is_transformer_lens_format(str(spec.model.name)):
        target.model_folder = fetch_model(str(spec.model.name), spec.model.revision)
    if target.model_folder is not None:
        check_model(target.model_folder, what)
    return target


def _dequantised(target: Target) -> Path:
    """The Hugging Face directory made of the target's GGUF file."""
    from fra.checkpoints.gguf import hugging_face_directory, installed_file

    model = target.spec.model
    given = str(model.gguf)
    return hugging_face_directory(
        target._path(given) if model.package is None else installed_file(model.package, given)
    )


def file_of(model: Any) -> tuple[Path, str] | None:
    """The target file that a model was loaded from, and its precision; None for a model that was made otherwise."""
    target = _LOADED.get(model)
    return None if target is None or target.file is None else (target.file, target.dtype)


def has_dictionary(target: Target, layer: int) -> bool:
    """Whether the target has a dictionary at the layer's attention input."""
    try:
        target.hook_for(layer)
    except FraError:
        return False
    return True


def head_output_hooks(target: Target) -> list[str]:
    """Hooks of the target's dictionaries of head outputs, each by itself (attn.hook_z) or through W_O (hook_attn_out),
    by layer; none of them is loaded.
    """
    return sorted(
        (hook for hook in target.dictionaries if is_output(hook)), key=lambda hook: (output_layer_of(hook) or 0, hook)
    )


def in_double(target: Target) -> Target:
    """The same target in float64, loaded when first used. Raises FraError on a device that has no float64, and for a
    target that is already loaded (`fra.load`) in another precision.
    """
    return target.in_double()
