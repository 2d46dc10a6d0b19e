"""A target made of what stands in memory: a model, its dictionaries and texts, without a target file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from fra.dictionaries.hooks import is_head_output, is_output
from fra.errors import FraError
from fra.targets.documents import Document
from fra.targets.file import ModelTable, SizeTable, TargetSpec, TextTable, sentence
from fra.targets.target import Target

if TYPE_CHECKING:
    from fra.core.weights import Model


class GivenTarget(Target):
    """A target whose model and dictionaries were given, not loaded; made by `fra.load`."""

    def __init__(
        self, spec: TargetSpec, model: Model, dictionaries: Mapping[str, Any], documents: Sequence[Document]
    ) -> None:
        own = next(model.parameters())
        super().__init__(spec, Path(), str(own.device), str(own.dtype).removeprefix("torch."))
        self._model, self._documents = model, tuple(documents)
        self.dictionaries = dict(dictionaries)

    @cached_property
    def model(self) -> Model:
        """The model that was given."""
        self._model.cfg.default_prepend_bos = self.prepend_bos
        return self._model

    @cached_property
    def _metadata(self) -> dict[str, Mapping[str, Any]]:
        return {hook: sae.cfg.metadata.to_dict() for hook, sae in self.dictionaries.items()}

    def documents(self) -> list[Document]:
        """The texts that were given."""
        return list(self._documents)

    def under(self, processing: frozenset[str]) -> Target:
        """Raises FraError: there are no files to load again."""
        raise FraError(f"the target {self.name!r} was made of a model in memory, whose processing is what it is.")

    @cached_property
    def _fingerprint(self) -> str:
        from fra.checkpoints.weights import hash_tensors

        digest = hashlib.sha256(f"{self.dtype} bos={self.prepend_bos}\n".encode())
        hash_tensors(digest, self.model.state_dict())
        for hook, sae in self.dictionaries.items():
            digest.update(f"dictionary {hook}\n".encode())
            hash_tensors(digest, sae.state_dict())
        for document in self._documents:
            digest.update(f"document {document.name} {len(document.text)}\n{document.text}".encode())
        return digest.hexdigest()

    def in_double(self) -> Target:
        """Itself where it is in float64; else raises FraError: there are no files to load again."""
        if self.dtype == "float64":
            return self
        raise FraError(
            f"the target {self.name!r} was made of a model in memory, which cannot be loaded again in float64: name "
            "model and dictionaries in a target file, or give the model in float64."
        )


def load(
    model: Model,
    sae: Any,
    texts: Sequence[str] | Mapping[str, str],
    *,
    name: str = "mine",
    prepend_bos: bool | None = None,
) -> Target:
    """A target without a target file: what `load_target` gives, of a model and dictionaries that are loaded already.

    model: TransformerBridge or HookedTransformer, with its tokenizer, weights processed as they were when the
    dictionaries were trained (what they say of that is checked where it is asked for: `Target.processing`). sae: a
    SAELens dictionary, or several in a list; each says in its metadata at which hook it was trained. texts: documents,
    in a list or by name; each is a source of its own. prepend_bos: whether documents begin with BOS; what the
    dictionaries say where it is not given, else yes.

        target = fra.load(model, sae, texts)
        m = fra.resolve(target.model, sae, target.tokens(texts[0]), head="L1H4")

    `fra.targets.admit(target)` holds model, dictionaries and text against each other, as `pytest claims/` does before
    it measures; that itself needs a target file. Raises FraError (one sentence) for a model without a tokenizer, no
    text or an empty one, two dictionaries of one hook, and dictionaries of another kind or width.
    """
    from fra.architectures.known import architecture_of
    from fra.dictionaries.codes import check_dictionary, check_kind, dictionary_hook

    architecture_of(model)  # refuses, in a sentence, what is no model
    if getattr(model, "tokenizer", None) is None:
        raise FraError("the model has no tokenizer, which texts need: set model.tokenizer.")
    dictionaries: dict[str, Any] = {}
    d_model, heads = int(model.cfg.d_model), int(model.cfg.n_heads) * int(model.cfg.d_head)
    for one in sae if isinstance(sae, (list, tuple)) else [sae]:
        check_kind(one)
        hook = dictionary_hook(one)
        if not is_output(hook):
            check_dictionary(one)
        width = heads if is_head_output(hook) else d_model
        if one.cfg.d_in != width:
            raise FraError(
                f"the dictionary at {hook!r} has width {one.cfg.d_in} and the model there has {width}: it belongs to "
                "another model."
            )
        if dictionaries.setdefault(hook, one) is not one:
            raise FraError(f"two dictionaries at {hook}: give one for each hook.")
    documents = _documents(texts)
    try:
        spec = TargetSpec(
            name=name,
            model=ModelTable(name=str(getattr(model.cfg, "model_name", "") or "given"), prepend_bos=prepend_bos),
            text=TextTable(documents="given", sources="document"),
            size=SizeTable(n_layers=int(model.cfg.n_layers), n_heads=int(model.cfg.n_heads)),
        )
    except ValidationError as error:
        raise FraError(f"fra.load was given what makes no target: {sentence(error)}.") from error
    return GivenTarget(spec, model, dictionaries, documents)


def _documents(texts: Sequence[str] | Mapping[str, str]) -> list[Document]:
    """Texts as documents, each its own source."""
    if isinstance(texts, str):
        raise FraError("texts must be several documents, not one text: give a list of texts, or a dict by name.")
    width = len(str(len(texts)))
    named = (
        dict(texts)
        if isinstance(texts, Mapping)
        else {f"text-{number:0{width}d}": text for number, text in enumerate(texts, 1)}
    )
    if not named:
        raise FraError("texts names no document: give at least one text.")
    for name, text in named.items():
        if not isinstance(text, str):
            raise FraError(f"the document {name!r} is no text but of type {type(text).__name__}: give texts.")
        if not text.strip():
            raise FraError(f"the document {name!r} is empty: write text into it or leave it out.")
    return [Document(name, name, text) for name, text in named.items()]
