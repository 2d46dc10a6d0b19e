"""Where a dictionary fits best: at which hook, in which layer, under which weight processing. Measured fit decides;
what metadata says advises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.architectures.known import architecture_of
from fra.core.frozen import read_present
from fra.core.weights import ov_weights
from fra.dictionaries.fits import (
    POOR,
    FitAt,
    clearly_better,
    explained_variance,
    places,
    reconstructed,
    somewhat_better,
)
from fra.dictionaries.hooks import LayerHooks, head_output_layer_of, is_normalized, is_output, output_layer_of
from fra.errors import FraError
from fra.targets.processing import NAMED, declared_by, describe, disagreement

if TYPE_CHECKING:
    from fra.targets.admission import Quality
    from fra.targets.target import Target

_HALF = 0.5
_VOUCHED = 0.3
"""What a dictionary whose metadata names its hook must explain or recover there to be kept though it fits another
better: some activations are easier than others.
"""
_ALIKE = 1e-3
"""Of explained variance: processings that differ by less are the same to a dictionary."""

Texts = Sequence[Int[Tensor, " _pos"]]


@torch.no_grad()
def activations(target: Target, hooks: Sequence[str], texts: Texts) -> dict[str, Float[Tensor, "rows _width"]]:
    """What stands at those of the hooks that the model has, the first position of each text left out."""
    found: dict[str, list[Tensor]] = {}
    for tokens in texts:
        home = tokens[None].to(target.device)
        for hook, x in read_present(
            target.model, home, target.n_layers - 1, dict(zip(hooks, hooks, strict=True))
        ).items():
            found.setdefault(hook, []).append(x[0].flatten(1)[1:])
    return {hook: torch.cat(rows) for hook, rows in found.items()}


@torch.no_grad()
def explained_at(target: Target, sae: Any, read: Mapping[str, Float[Tensor, "rows _width"]]) -> dict[str, float]:
    """Variance explained by a dictionary of activations of its width, by hook."""
    found = {}
    for hook, x in read.items():
        if x.shape[1] == sae.cfg.d_in and (sae.cfg.reshape_activations != "hook_z" or x.shape[1] % target.n_heads == 0):
            error, _, _ = reconstructed(sae, x, target.n_heads)
            found[hook] = explained_variance(x, error)
    return {hook: value for hook, value in found.items() if value == value}


def best_processing(fits: Mapping[str, Mapping[str, float]]) -> str | None:
    """The processing under which the dictionaries explain most together, of those that can be read under each; None
    where it makes no difference to them. fits: explained variance by processing and hook.
    """
    shared = set.intersection(*map(set, fits.values())) if fits else set()
    if len(fits) < 2 or not shared:
        return None
    totals = {word: sum(by_hook[hook] for hook in shared) / len(shared) for word, by_hook in fits.items()}
    if max(totals.values()) - min(totals.values()) < _ALIKE:
        return None
    return max(totals, key=lambda word: totals[word])


def judged(target: Target, texts: Texts, qualities: Sequence[Quality]) -> list[str]:
    """Remarks on dictionaries whose fit is not what the target file or their metadata would have it; none where all is
    well.

    texts: a few documents. qualities: of every dictionary at its hook. Raises FraError for one that clearly fits better
    elsewhere, or nowhere, unless the target file accepts it.
    """
    own = _own(target)
    word = describe(own)
    unlike = {q.hook: disagreement(q.hook, declared_by(_metadata(target, q.hook)), own) for q in qualities}
    sought = [q for q in qualities if not q.explained_variance >= POOR or target.named_hook(q.hook) is None]
    everywhere = {q.hook: places(q.hook, target.n_layers) for q in sought}
    read = activations(target, sorted({p for some in everywhere.values() for p in some} | {*unlike}), texts)
    fits = {
        q.hook: [
            FitAt(hook, word, value)
            for hook, value in explained_at(
                target, target.dictionaries[q.hook], {p: read[p] for p in everywhere.get(q.hook, [q.hook]) if p in read}
            ).items()
        ]
        for q in qualities
    }
    if ways := _worth_trying(target, qualities, unlike, fits, read):
        for way in ways:
            _try(target, way, texts, everywhere, fits)
    remarks = [
        f"the dictionary at {hook!r} was trained at {named!r}, as its metadata says; accepted, as the target file asks "
        "(accept_mismatch)."
        for hook in (q.hook for q in qualities)
        if (named := target.named_hook(hook)) not in (None, hook)
    ]
    for quality in qualities:
        hook = quality.hook
        verdict = _Judged(quality, fits[hook], word, unlike[hook], target.named_hook(hook) == hook)
        if (wrong := verdict.wrong()) is None:
            remarks += verdict.remarks()
        elif hook in target.accepted:
            remarks.append(f"{wrong}; accepted, as the target file asks (accept_mismatch).")
        else:
            raise FraError(f"{wrong}; if it is used so on purpose, write accept_mismatch = true in its [[dictionary]].")
    return remarks


def _own(target: Target) -> frozenset[str]:
    """The target's processing; none of a model in memory of which nobody says how it was processed: it is as it is."""
    try:
        return target.processing
    except FraError:
        if target.spec.text.documents != "given":
            raise
        return frozenset()


def _metadata(target: Target, hook: str) -> dict[str, Any]:
    return dict(target.dictionaries[hook].cfg.metadata.to_dict())


def _worth_trying(
    target: Target,
    qualities: Sequence[Quality],
    unlike: Mapping[str, str | None],
    fits: Mapping[str, Sequence[FitAt]],
    read: Mapping[str, Tensor],
) -> list[frozenset[str]]:
    """Other processings for which a second model is worth its time: where metadata says another or, of a processed
    model, none, where a dictionary explains more of what folding makes of an activation, and where it fits nowhere.
    """
    own = _own(target)
    ways: list[frozenset[str]] = []
    for quality in qualities:
        named = declared_by(_metadata(target, quality.hook))
        here = _at(fits[quality.hook], quality.hook)
        best = max((fit.explained for fit in fits[quality.hook]), default=here)
        nowhere = max(here, best) < _HALF and not (quality.loss_recovered or 0) >= _HALF
        if unlike[quality.hook] and named is not None:
            ways.append(frozenset(flag for flag, on in named.items() if on))
        if unlike[quality.hook] or nowhere or (named is None and own) or _prefers_folded(target, quality.hook, read):
            ways += NAMED.values()
    return [way for way in dict.fromkeys(ways) if way != own]


def _prefers_folded(target: Target, hook: str, read: Mapping[str, Tensor]) -> bool:
    """Whether the dictionary explains more of the activation as folding would make it: without the mean over
    dimensions, where LayerNorm takes it out anyway; head outputs without value biases.
    """
    x, layer = read.get(hook), output_layer_of(hook)
    if x is None or is_normalized(hook):
        return False
    model = target.model
    if (at := head_output_layer_of(hook)) is not None:
        bias = ov_weights(model, at, LayerHooks(at).normalized).b_V.flatten()
        folded = x - bias.to(x) if len(bias) == x.shape[1] else x
    elif architecture_of(model).read_qk(layer or 0).norm.centred:
        folded = x - x.mean(-1, keepdim=True)
    else:
        return False
    sae = target.dictionaries[hook]
    if sae.cfg.d_in != x.shape[1] or torch.equal(folded, x):
        return False
    values = explained_at(target, sae, {"own": x, "folded": folded})
    return len(values) == 2 and somewhat_better(values["own"], values["folded"])


def _try(
    target: Target,
    way: frozenset[str],
    texts: Texts,
    everywhere: Mapping[str, Sequence[str]],
    fits: dict[str, list[FitAt]],
) -> None:
    """Add what every dictionary explains under another processing, at its hook and where else it was tried."""
    try:
        other = target.under(way)
        read = activations(other, sorted({*fits, *(p for some in everywhere.values() for p in some)}), texts)
    except (FraError, MemoryError, torch.OutOfMemoryError):
        return  # what cannot be had under that processing cannot be meant by it
    for hook, found in fits.items():
        at = {p: read[p] for p in everywhere.get(hook, [hook]) if p in read}
        found += [
            FitAt(p, describe(way), value) for p, value in explained_at(target, target.dictionaries[hook], at).items()
        ]


def _at(fits: Sequence[FitAt], hook: str, processing: str | None = None) -> float:
    return next((f.explained for f in fits if f.hook == hook and processing in (None, f.processing)), float("-inf"))


@dataclass(frozen=True)
class _Judged:
    """One dictionary: what was measured of it, and what the model and its metadata are said to be."""

    quality: Quality
    fits: Sequence[FitAt]
    processing: str
    unlike: str | None
    """What metadata says against that processing."""
    vouched: bool
    """Whether metadata names the hook where it is used."""

    @property
    def here(self) -> float:
        return _at(self.fits, self.quality.hook, self.processing)

    @property
    def best(self) -> FitAt:
        return self._best(self.fits)

    @property
    def turned(self) -> FitAt:
        """The best at the same hook, under any processing."""
        return self._best([fit for fit in self.fits if fit.hook == self.quality.hook])

    def _best(self, fits: Sequence[FitAt]) -> FitAt:
        own = FitAt(self.quality.hook, self.processing, self.here)
        return max(fits, key=lambda fit: fit.explained + _ALIKE * (fit.processing == self.processing), default=own)

    @property
    def recovered(self) -> float | None:
        """Share of the loss, where it counts: at outputs of attention."""
        return self.quality.loss_recovered if is_output(self.quality.hook) else None

    def _explains(self) -> str:
        return (
            f"the dictionary at {self.quality.hook!r} explains {self.here:.2f} of the variance there on the target's "
            "own text"
        )

    def _elsewhere(self) -> str:
        best = self.best
        under = f" with processing {best.processing!r}" if best.processing != self.processing else ""
        return f"{self._explains()} and {best.explained:.2f} at {best.hook!r}{under}"

    def _tried(self) -> str:
        n, ways = len({fit.hook for fit in self.fits}), len({fit.processing for fit in self.fits})
        return (
            f"of {n} hook{'s' * (n > 1)} and {ways} weight processing{'s' * (ways > 1)} none fits clearly better (best "
            f"{self.best.explained:.2f} at {self.best.hook!r})"
        )

    def _kept(self) -> bool:
        """Whether metadata names the hook and the dictionary does something there."""
        output = is_output(self.quality.hook)
        does = self.here >= _VOUCHED or (output and (self.recovered is None or self.recovered >= _VOUCHED))
        return self.vouched and does

    def wrong(self) -> str | None:
        """Why the dictionary is refused, without a full stop; None where it is not."""
        hook, best, turned = self.quality.hook, self.best, self.turned
        if somewhat_better(self.here, turned.explained) and not clearly_better(turned.explained, best.explained):
            return (
                f"{self._explains()} with weight processing {self.processing!r} and {turned.explained:.2f} with "
                f"{turned.processing!r}, so it was trained under that: {turned.advice(hook, self.processing)}"
            )
        if clearly_better(self.here, best.explained) and not self._kept():
            return f"{self._elsewhere()}, where it belongs: {best.advice(hook, self.processing)}"
        useless = not is_output(hook) or (self.recovered is not None and not self.recovered > 0)
        if self.quality.explained_variance > 0 or not useless:
            return None
        nothing = "" if self.recovered is None else f" and recovers nothing of the loss ({self.recovered:.2f})"
        return (
            f"the dictionary at {hook!r} explains no more than the mean does on the target's own text (explained "
            f"variance {self.quality.explained_variance:.2f}){nothing}: it was made for another model, hook or weight "
            f"processing; {self._tried()}"
        )

    def remarks(self) -> list[str]:
        """What is to be known of a dictionary that is not refused."""
        said = []
        if clearly_better(self.here, self.best.explained):
            said.append(f"{self._elsewhere()}: make sure that it was trained where it is used.")
        elif not self.quality.explained_variance >= _HALF and not (self.recovered or 0) >= _HALF:
            said.append(f"{self._explains()}, which is little; {self._tried()}.")
        if self.unlike is not None:
            several = len({fit.processing for fit in self.fits}) > 1
            other = "no more with another" if several else "could not be tried with another"
            said.append(
                f"by its metadata {self.unlike}; it explains {self.here:.2f} of the variance so, and {other}: the "
                "target file is believed."
            )
        return said
