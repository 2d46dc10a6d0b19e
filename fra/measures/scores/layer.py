"""One layer of a target on natural documents, with its dictionary and the dictionaries that are nulls: the measuring
layer that claims about what features carry share.

Codes are computed once a layer and shared by its heads and by every claim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.architectures.known import architecture_of
from fra.core.frozen import FrozenLayer, freeze, read_hooks
from fra.core.threads import each
from fra.core.weights import Model
from fra.dictionaries.codes import Codes, codes, decoded
from fra.dictionaries.hooks import LayerHooks
from fra.dictionaries.tokens import TokenDictionary, learn
from fra.errors import CannotLoad
from fra.search import nulls
from fra.statistics.stats import seed_of
from fra.stimuli.designs import NaturalSets
from fra.stimuli.padding import Texts, padded
from fra.stimuli.sources import disjoint

if TYPE_CHECKING:
    from fra.targets.target import Target

FEATURES, ATOMS, TOKENS, SHUFFLED = "features", "random atoms", "token dictionary", "shuffled decoder"

_FEWEST_DOCUMENTS = 8
_AT_ONCE = 50


def texts(documents: Sequence[tuple[str, Sequence[int]]], longest: int) -> Texts:
    """Documents of (source, token ids), padded to `longest`. Raises CannotLoad where there are none or one is empty."""
    if not documents or not all(len(ids) for _, ids in documents):
        raise CannotLoad("there are no documents to measure on, or one of them is empty: add text to text.documents")
    rows = padded([torch.tensor(ids) for _, ids in documents], longest)
    return Texts(rows, tuple(len(ids) for _, ids in documents), tuple(source for source, _ in documents))


@dataclass(frozen=True)
class Sets:
    """Three disjoint sets of natural documents."""

    measured: Texts
    """Every quoted number; spread over the whole text."""
    selection: Texts
    """Where channels are chosen and predictors tuned."""
    estimation: Texts
    """Where token dictionary and token means come from."""


def document_sets(target: Target, design: NaturalSets | None = None) -> Sets:
    """The target's text in three sets, cut by source, seeded from its name. Raises CannotLoad where there are fewer
    than 8 texts.
    """
    every, design = target.documents(), design or NaturalSets()
    if len(every) < _FEWEST_DOCUMENTS:
        raise CannotLoad(
            f"{target.name!r} has {len(every)} documents where {_FEWEST_DOCUMENTS} are needed: add text to "
            "text.documents"
        )
    encoded = [(doc.source, target.tokens(doc.text, design.longest).tolist()) for doc in every]
    longest = max(len(ids) for _, ids in encoded)
    sizes = {"measured": design.measured, "selection": design.selection, "estimation": design.estimation}
    parts = disjoint([doc.source for doc in every], sizes, ("measured",), (target.name, "natural", "sets"))
    return Sets(*(texts([encoded[k] for k in part], longest) for part in parts.values()))


@torch.no_grad()
def observe(
    model: Model, tokens: Int[Tensor, "docs pos"], layer: int, hook_name: str, what: Sequence[str]
) -> dict[str, Tensor]:
    """Some of x, scores, pattern and sigma (absent where the hook stands behind the norm) as `freeze` reads them,
    without its checks: for further documents of a layer that was frozen before.
    """
    own, points = architecture_of(model), LayerHooks(layer)
    shown = own.input_hooks(layer, hook_name) | {"scores": points.attn_scores, "pattern": points.pattern}
    names = {name: hook for name, hook in shown.items() if name in what}
    parts = [read_hooks(model, part.to(own.device), layer, names) for part in torch.split(tokens, _AT_ONCE)]
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def shuffled_decoder(
    x: Float[Tensor, "docs pos d_model"], given: Codes, generators: Sequence[torch.Generator]
) -> Codes:
    """The codes with the directions of live features exchanged among each other, in every document by a draw of its own
    (one generator a document); the remainder is error.
    """
    docs, pos = given.shape
    live, slot = torch.unique(given.feature, return_inverse=True)
    orders = torch.stack([torch.randperm(len(live), generator=generator) for generator in generators]).to(live)
    feature = live[orders[given.row // pos, slot]]
    order = (given.row * len(given.decoder) + feature).argsort()
    row, feature, value = given.row[order], feature[order], given.value[order]
    left = (x - given.bias).flatten(0, 1) - decoded(row, feature, value, given.decoder, docs * pos)
    return dataclasses.replace(given, row=row, feature=feature, value=value, error=left.view_as(x))


@dataclass(frozen=True)
class DocumentEntries:
    """The live entries of one document."""

    pos: Int[Tensor, " n"]
    feature: Int[Tensor, " n"]
    value: Float[Tensor, " n"]


def entries(given: Codes, doc: int, length: int) -> DocumentEntries:
    """Entries of one document, its padding left out; by position, then feature."""
    first = doc * given.shape[1]
    ends = torch.tensor([first, first + length], device=given.row.device)
    low, high = torch.searchsorted(given.row, ends).tolist()
    return DocumentEntries(given.row[low:high] - first, given.feature[low:high], given.value[low:high])


class CarriedLayer:
    """One layer on the documents of `Sets`: frozen activations, and codes in four dictionaries.

    Computed when first asked for. Raises FraError where model, dictionary and hook do not fit (see `fra.resolve`).
    """

    def __init__(self, model: Model, sae: Any, sets: Sets, layer: int, hook_name: str, *, seed_parts: Sequence[str]):
        self.model, self.sae, self.sets = model, sae, sets
        self.layer, self.hook_name, self.seed_parts = layer, hook_name, (*seed_parts, str(layer))

    @cached_property
    def frozen(self) -> FrozenLayer:
        """The layer on the measured documents."""
        return freeze(self.model, self.sets.measured.tokens, self.layer, self.hook_name)

    def generator(self, *what: str) -> torch.Generator:
        """Seeded from the target, the layer and what it is for."""
        return torch.Generator().manual_seed(seed_of(*self.seed_parts, *what))

    @cached_property
    def estimation(self) -> dict[str, Tensor]:
        """What the model shows on the estimation documents (`observe`), but for patterns."""
        got = observe(self.model, self.sets.estimation.tokens, self.layer, self.hook_name, ("x", "scores", "sigma"))
        return {name: value.to(self.frozen.x) for name, value in got.items()}

    @cached_property
    def token_dictionary(self) -> TokenDictionary:
        """Learnt on the estimation documents."""
        texts, x = self.sets.estimation, self.estimation["x"]
        return learn(x, texts.tokens.to(x.device), texts.lengths)

    @cached_property
    def selection(self) -> tuple[FrozenLayer, Codes]:
        """The layer on the selection documents, and their codes."""
        frozen = freeze(self.model, self.sets.selection.tokens, self.layer, self.hook_name)
        return frozen, codes(self.sae, frozen.x)

    @cached_property
    def _codes(self) -> dict[str, Codes]:
        return {}

    @torch.no_grad()
    def codes(self, name: str) -> Codes:
        """Codes of the measured documents in features, token dictionary or shuffled decoder; random atoms are another
        dictionary in every document (`in_atoms`).
        """
        if name not in self._codes:
            x = self.frozen.x
            if name == FEATURES:
                made = codes(self.sae, x)
            elif name == TOKENS:
                made = self.token_dictionary.codes(x, self.sets.measured.tokens.to(x.device))
            else:
                draws = [self.generator("shuffle", str(number)) for number in range(len(x))]
                made = shuffled_decoder(x, self.codes(FEATURES), draws)
            self._codes[name] = made
        return self._codes[name]

    def atoms(self, number: int) -> Float[Tensor, "n_atoms d_model"]:
        """The random atoms of one measured document, as many as the dictionary has features: a draw of its own, so that
        the scatter over draws is part of the spread over documents.
        """
        own = self.codes(FEATURES).decoder
        return nulls.draw_atoms(len(own), self.generator("atoms", str(number)), self.frozen.x)

    @cached_property
    def _pursued(self) -> list[tuple[DocumentEntries, Tensor]]:
        own, lengths = self.codes(FEATURES), self.sets.measured.lengths
        docs, pos = own.shape
        l0 = torch.bincount(own.row, minlength=docs * pos).view(docs, pos)

        def pursue(number: int) -> tuple[DocumentEntries, Tensor]:
            n, atoms = lengths[number], self.atoms(number)
            left, counts = self.frozen.x[number, :n] - own.bias[number, :n], l0[number, :n]
            if not bool(counts.any()):
                nothing = counts[:0]
                return DocumentEntries(nothing, nothing, left[:0, 0]), torch.zeros_like(own.bias[number])
            found = DocumentEntries(*nulls.matching_pursuit(left, atoms, counts))
            return found, decoded(found.pos, found.feature, found.value, atoms, pos)

        return each(pursue, range(docs), self.frozen.x.device)

    def in_atoms(self, number: int) -> DocumentEntries:
        """One measured document in its own random atoms: equal number and L0, by matching pursuit. Bias terms stay the
        dictionary's, what atoms leave is error.
        """
        return self._pursued[number][0]

    @cached_property
    def carried_by_atoms(self) -> Float[Tensor, "docs pos d_model"]:
        """What the random atoms of each measured document bring to x; zero on padding."""
        return torch.stack([part for _, part in self._pursued])

    @cached_property
    def mean_l0(self) -> float:
        """Live features a position of the selection documents, padding left out."""
        _, own = self.selection
        texts = self.sets.selection
        real = texts.real.to(own.row.device).flatten()
        return float(real[own.row].sum()) / float(sum(texts.lengths))

    @property
    def heads(self) -> Iterable[int]:
        """Query heads of the layer."""
        return range(self.frozen.n_heads)


def carried_layer(target: Target, sets: Sets, layer: int) -> CarriedLayer | None:
    """The layer of a target; None where the target has no dictionary at its attention input."""
    from fra.targets.target import has_dictionary

    if not has_dictionary(target, layer):
        return None
    hook, sae = target.dictionary_for(layer)
    return CarriedLayer(target.model, sae, sets, layer, hook, seed_parts=(target.name, "carried"))
