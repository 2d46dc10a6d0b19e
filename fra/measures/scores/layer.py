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
from fra.core.coded import Arm
from fra.core.frozen import FrozenLayer, freeze, read_hooks
from fra.core.weights import Model
from fra.dictionaries.codes import Codes, codes
from fra.dictionaries.hooks import LayerHooks
from fra.dictionaries.tokens import TokenDictionary, learn
from fra.errors import CannotLoad
from fra.induction import nulls
from fra.stimuli.padding import Texts, padded
from fra.stimuli.sources import disjoint
from fra.verdicts.stats import seed_of

if TYPE_CHECKING:
    from fra.targets.target import Target

FEATURES, ATOMS, TOKENS, SHUFFLED = "features", "random atoms", "token dictionary", "shuffled decoder"
DICTIONARIES = (FEATURES, ATOMS, TOKENS, SHUFFLED)

MEASURED, SELECTION, ESTIMATION = 120, 40, 120
"""Documents of the three sets, at most: never more than half of the text, than half of what is left."""
LONGEST = 128
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


def document_sets(target: Target) -> Sets:
    """The target's text in three sets, seeded from its name. Raises CannotLoad where there are fewer than 8 texts."""
    every = target.documents()
    if len(every) < 8:
        raise CannotLoad(f"{target.name!r} has {len(every)} documents where 8 are needed: add text to text.documents")
    cut = min(LONGEST, int(target.model.cfg.n_ctx))
    start = [] if target.bos is None else [target.bos]
    encoded = [(doc.source, (start + target.encode(doc.text))[:cut]) for doc in every]
    longest = max(len(ids) for _, ids in encoded)
    sizes = {"measured": MEASURED, "selection": SELECTION, "estimation": ESTIMATION}
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


def shuffled_decoder(x: Float[Tensor, "docs pos d_model"], given: Codes, generator: torch.Generator) -> Codes:
    """The codes with the directions of live features exchanged among each other; the remainder is error."""
    live = torch.unique(given.feature)
    order = torch.randperm(len(live), generator=generator).to(live)
    decoder = given.decoder.clone()
    decoder[live] = given.decoder[live[order]]
    left = (x - given.bias).flatten(0, 1)
    left = left.index_add(0, given.row, -given.value[:, None] * decoder[given.feature])
    return dataclasses.replace(given, decoder=decoder, error=left.view_as(x))


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
    def _codes(self) -> dict[str, Codes]:
        return {}

    @torch.no_grad()
    def codes(self, name: str) -> Codes:
        """Codes of the measured documents in one of DICTIONARIES."""
        if name not in self._codes:
            x = self.frozen.x
            if name == FEATURES:
                made = codes(self.sae, x)
            elif name == ATOMS:
                own = self.codes(FEATURES)
                atoms = nulls.draw_atoms(len(own.decoder), self.generator("atoms"), x)
                made = nulls.random_atoms(Arm(self.frozen, own), atoms).codes
            elif name == TOKENS:
                made = self.token_dictionary.codes(x, self.sets.measured.tokens.to(x.device))
            else:
                made = shuffled_decoder(x, self.codes(FEATURES), self.generator("shuffle"))
            self._codes[name] = made
        return self._codes[name]

    @cached_property
    def mean_l0(self) -> float:
        """Live features a position of the measured documents, padding included in neither."""
        own, pos = self.codes(FEATURES), self.frozen.x.shape[1]
        lengths = torch.tensor(self.sets.measured.lengths, device=own.row.device)
        real = own.row % pos < lengths[own.row // pos]
        return float(real.sum()) / float(lengths.sum())

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
