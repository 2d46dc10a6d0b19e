"""L0 against loss recovered: dictionaries of head outputs put in the model's way, and their arms compared at equal L0.

Of a document d with the loss `clean_d`, `zero_d` with the hook's activation at zero and `spliced_d` with its
reconstruction, an arm recovers sum_d (zero_d - spliced_d) / sum_d (zero_d - clean_d). Between the points of an arm the
loss is interpolated in log L0, never extrapolated. L0 is measured on documents of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.errors import CannotLoad, FraError
from fra.stimuli.natural import natural_documents, natural_sources
from fra.stimuli.repeated import repeated_natural
from fra.targets.target import Target
from fra.verdicts import stats
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.conditions import condition
from fra.verdicts.stats import by_source

_AT_ONCE = 12  # documents a forward pass
_GRID = 5  # sparsities at which two arms are compared
LEAST_GAP = 0.05
"""Nats a token that putting the hook to zero must cost, before a share of it says anything."""
NO_STUDY = "the target has no study of block-diagonal dictionaries ([[study]] of its file)"
DENSE = "gate: dense recovers"
"""Name of the gate: the share of the loss that the densest dictionary of the control arm must recover."""


@dataclass(frozen=True)
class Point:
    """One dictionary in the model's way."""

    l0: Float[np.ndarray, " n_heads"]
    """Live features at a position by head, on the documents of selection; a feature of a dense dictionary counts for
    the head that holds most of its decoder row.
    """
    loss: Float[np.ndarray, " n_documents"]
    """Loss of each measured document, summed over its positions."""
    explained: Float[np.ndarray, " n_heads"]
    """Explained variance by head, on the documents of selection."""
    d_sae: int
    weights: int
    """Parameters of encoder and decoder, biases apart."""

    @property
    def total(self) -> float:
        """L0."""
        return float(self.l0.sum())


class Frontier:
    """The target's study of dictionaries at one hook, measured when asked for; `study` makes one.

    n: documents; every other one for selection, the rest measured. stimulus: "natural", or "repeated_natural" (BOS, a
    passage, the same passage), where heads that copy have something to do.
    """

    def __init__(self, target: Target, n: int, stimulus: str = "natural") -> None:
        self.target, self.hook = target, target.spec.study[0].hook
        self.model, self.n_heads = target.model, target.n_heads
        documents, sources = _documents(target, n, stimulus)
        self.selection, self.measured = documents[::2], documents[1::2]
        self.selection_sources, self.sources = sources[::2], sources[1::2]
        self._points: dict[str, list[Point]] = {}

    @cached_property
    def clean(self) -> Float[np.ndarray, " n_documents"]:
        """The model's own loss of each measured document, summed over positions."""
        return self._losses(None)

    @cached_property
    def gap(self) -> Float[np.ndarray, " n_documents"]:
        """What it costs each measured document to have the hook's activation at zero."""
        found: np.ndarray = self._losses(torch.zeros_like) - self.clean
        return found

    @property
    def n_tokens(self) -> int:
        """Predictions in the measured documents."""
        return sum(len(tokens) - 1 for tokens in self.measured)

    def head_outputs(self, documents: Sequence[Int[Tensor, " _pos"]]) -> list[Float[Tensor, "_pos n_heads d_head"]]:
        """The hook's activation on each document, by head."""
        found: dict[int, Tensor] = {}
        for which, tokens in _batches(documents):
            _, cache = self.model.run_with_cache(tokens.to(self.target.device), names_filter=[self.hook])
            z = cache[self.hook].reshape(*tokens.shape, self.n_heads, -1)
            found |= {d: z[k, : len(documents[d])] for k, d in enumerate(which)}
        return [found[d] for d in range(len(documents))]

    @torch.no_grad()
    def points(self, arm: str) -> list[Point]:
        """The dictionaries of an arm by rising L0; none where the target's study has no such arm."""
        if arm not in self._points:
            self._points[arm] = sorted(
                (self.measure(sae) for sae in self.target.study(arm)), key=lambda point: point.total
            )
        return self._points[arm]

    @cached_property
    def _selected(self) -> Float[Tensor, "n n_heads d_head"]:
        with torch.no_grad():
            # The first position is an attention sink of outlying norm in most models.
            return torch.cat([z[1:] for z in self.head_outputs(self.selection)])

    @torch.no_grad()
    def measure(self, sae: Any) -> Point:
        """One dictionary of head outputs in the model's way."""
        x = self._selected
        acts = encode(sae, x)
        rest = (x - decode(sae, acts, x)).square().sum((0, 2))
        spread = (x - x.mean(0)).square().sum((0, 2))
        owner = torch.zeros(sae.cfg.d_sae, self.n_heads, dtype=torch.float64)
        owner[torch.arange(len(owner)), head_of(sae, self.n_heads).cpu()] = 1
        return Point(
            l0=((acts > 0).double().mean(0).cpu() @ owner).numpy(),
            loss=self._losses(lambda z: decode(sae, encode(sae, z), z)),
            explained=(1 - rest / spread).double().cpu().numpy(),
            d_sae=int(sae.cfg.d_sae),
            weights=sum(p.numel() for name, p in sae.named_parameters() if name.startswith("W_")),
        )

    def by_head(self, sae: Any | None) -> Float[np.ndarray, " n_heads"]:
        """What it costs, in nats a token, to have one head's output alone as the dictionary reconstructs it (from the
        outputs of all heads), or at zero (None), for every head.
        """

        def one(head: int) -> Callable[[Tensor], Tensor]:
            def replace(z: Tensor) -> Tensor:
                out = z.clone()
                out[:, :, head] = 0 if sae is None else decode(sae, encode(sae, z), z)[:, :, head].to(z)
                return out

            return replace

        costs = [(self._losses(one(head)) - self.clean).sum() / self.n_tokens for head in range(self.n_heads)]
        return np.array(costs)

    @torch.no_grad()
    def _losses(self, replace: Callable[[Tensor], Tensor] | None) -> Float[np.ndarray, " n_documents"]:
        """Summed loss of each measured document with `replace` of the hook's activation [batch, pos, n_heads, d_head]
        in its place.
        """

        def edit(z: Tensor, hook: Any) -> Tensor:
            assert replace is not None
            heads = z.reshape(*z.shape[:2], self.n_heads, -1)
            return replace(heads).reshape(z.shape).to(z.dtype)

        found = np.zeros(len(self.measured))
        for which, tokens in _batches(self.measured):
            on = tokens.to(self.target.device)
            hooks: list[Any] = [] if replace is None else [(self.hook, edit)]
            logits = self.model.run_with_hooks(on, fwd_hooks=hooks).float()
            each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), on[:, 1:], reduction="none")
            for k, d in enumerate(which):
                found[d] = float(each[k, : len(self.measured[d]) - 1].double().sum())
        return found

    def means(self, values: Float[np.ndarray, " n_documents"], seed: int) -> stats.ClusterMeans:
        """sum(values) / sum(gap), sources of documents as clusters."""
        return stats.ClusterMeans(by_source(values, self.sources), by_source(self.gap, self.sources), seed=seed)


def study(target: Target, n: int, stimulus: str = "natural") -> Frontier | None:
    """The target's study on n of its documents; None where its file names no [[study]]. Raises CannotLoad where it
    has fewer documents or too short ones, FraError for an unknown stimulus.
    """
    return Frontier(target, n, stimulus) if target.spec.study else None


def _documents(target: Target, n: int, stimulus: str) -> tuple[list[Int[Tensor, " _pos"]], list[str]]:
    """Token ids of n documents of a stimulus, and their sources."""
    sources = natural_sources(target, n)
    if stimulus == "natural":
        return natural_documents(target, n), sources
    if stimulus != "repeated_natural":
        raise FraError(f"there is no stimulus {stimulus!r} for a frontier: use natural or repeated_natural.")
    start = 0 if target.bos is None else 1
    texts = [tokens[start:].numpy() for tokens in natural_documents(target, n)]
    context = min(int(target.model.cfg.n_ctx), 1 + max(map(len, texts)))
    made = repeated_natural(
        list(zip(sources, texts, strict=True)), context, target.bos, (target.name, stimulus, "frontier")
    )
    if len(made) < n:
        raise CannotLoad(
            f"{target.name!r} has too short a context or text for {n - len(made)} repeated documents of {n}."
        )
    return [document.tokens for document in made], [document.source for document in made]


def _batches(documents: Sequence[Int[Tensor, " _pos"]]) -> list[tuple[list[int], Int[Tensor, "batch pos"]]]:
    """Documents of about one length, padded on the right, which a causal model does not see; and which they are."""
    order = sorted(range(len(documents)), key=lambda d: len(documents[d]))
    parts = [order[start : start + _AT_ONCE] for start in range(0, len(order), _AT_ONCE)]
    return [(part, torch.nn.utils.rnn.pad_sequence([documents[d] for d in part], batch_first=True)) for part in parts]


def encode(sae: Any, z: Float[Tensor, "*rows n_heads d_head"]) -> Float[Tensor, "*rows d_sae"]:
    """Codes of head outputs, whichever shape the dictionary reads."""
    x = z.to(sae.b_dec.dtype)
    codes: Tensor = sae.encode(x if sae.cfg.reshape_activations == "hook_z" else x.flatten(-2))
    return codes


def decode(
    sae: Any, acts: Float[Tensor, "*rows d_sae"], like: Float[Tensor, "*rows n_heads d_head"]
) -> Float[Tensor, "*rows n_heads d_head"]:
    """Reconstructed head outputs; call it right after `encode` of the same rows."""
    out: Tensor = sae.decode(acts)
    return out.reshape(like.shape)


def head_of(sae: Any, n_heads: int) -> Int[Tensor, " d_sae"]:
    """The head that holds most of each feature's decoder row (its squared norm)."""
    rows: Tensor = sae.W_dec.detach()
    return rows.reshape(len(rows), n_heads, -1).square().sum(-1).argmax(-1)


def at(points: Sequence[Point], l0: float) -> Float[np.ndarray, " n_documents"]:
    """Each document's loss at an L0 between the points', linear in log L0. Raises FraError outside them."""
    totals = np.log([point.total for point in points])
    if not totals[0] - 1e-9 <= np.log(l0) <= totals[-1] + 1e-9:
        raise FraError(f"L0 {l0:g} lies outside the arm's {np.exp(totals[0]):g} to {np.exp(totals[-1]):g}.")
    losses = np.stack([point.loss for point in points])
    return np.array([np.interp(np.log(l0), totals, losses[:, d]) for d in range(losses.shape[1])])


def shared_l0(a: Sequence[Point], b: Sequence[Point], b_over_a: float = 1.0) -> Float[np.ndarray, " n_grid"] | None:
    """L0 values L, geometrically spaced, such that arm a has L and arm b has L * b_over_a; None where they share less
    than a factor of 1.1.
    """
    low = max(a[0].total, b[0].total / b_over_a)
    high = min(a[-1].total, b[-1].total / b_over_a)
    return np.geomspace(low, high, _GRID) if high > 1.1 * low else None


def compare(
    claim: Claim,
    frontier: Frontier | None,
    a: str,
    b: str,
    *,
    control: str,
    b_over_a: float = 1.0,
    effect_of_interest: float | None = None,
    further: Sequence[str] = (),
) -> Evidence:
    """How much more of the loss arm `a` recovers at L0 = L than arm `b` at L * b_over_a, averaged over their shared
    range, against the claim's bar.

    control: the arm whose densest point must recover the gate's share (`claim.bars[DENSE]`).
    effect_of_interest: power is the chance to find the claim true if this were the effect; None where that is not at
    issue. further: arms that are shown beside.
    """

    def evidence(**what: Any) -> Evidence:
        return Evidence(claim=claim, head=None, **what)

    if frontier is None:
        return evidence(cannot=NO_STUDY)
    target = frontier.target
    for arm in (a, b):
        if sum(entry.arm == arm for entry in target.spec.study) < 2:
            return evidence(cannot=f"the study of {target.name!r} has fewer than two dictionaries of the arm {arm!r}")
    n = len(frontier.measured)
    gaps = by_source(frontier.gap, frontier.sources)
    if frontier.gap.sum() < LEAST_GAP * frontier.n_tokens or (gaps <= 0).any():
        per_token = frontier.gap.sum() / frontier.n_tokens
        reason = f"the hook at zero costs {per_token:.3f} nats a token, too little to ask what share is recovered"
        return evidence(undecided=reason, n=n)
    detail = {"frontier": [row for arm in (a, b, *further) for row in _rows(claim, frontier, arm)]}
    best = 1 - (frontier.points(control)[-1].loss - frontier.clean).sum() / frontier.gap.sum()
    if not best >= claim.bars[DENSE]:
        reason = f"the densest dictionary of {control!r} recovers {best:.0%} of the loss, where a comparison needs "
        return evidence(undecided=f"{reason}{claim.bars[DENSE]:.0%}", n=n, detail=detail)
    grid = shared_l0(frontier.points(a), frontier.points(b), b_over_a)
    if grid is None:
        return evidence(undecided=f"the arms {a!r} and {b!r} have no range of L0 in common", n=n, detail=detail)
    gain = np.mean([at(frontier.points(b), l0 * b_over_a) - at(frontier.points(a), l0) for l0 in grid], axis=0)
    means = frontier.means(gain, stats.seed_of(claim.digest, target.name))
    power = None
    if effect_of_interest is not None:
        power = float(stats.power_above(means, claim.bar, effect_of_interest, claim.level, simultaneous=False)[0])
    shown = {"compared at L0": grid, "in nats a token": float(gain.sum() / frontier.n_tokens)}
    return evidence(
        candidates={f"{a} over {b}": (condition("loss recovered", means, claim.bar, claim.level),)},
        n=n,
        power=power,
        detail=shown | detail,
    )


def _rows(claim: Claim, frontier: Frontier, arm: str) -> list[dict[str, Any]]:
    """The points of an arm for the reader: what each recovers, with the interval over documents."""
    rows = []
    for point in frontier.points(arm):
        lost = point.loss - frontier.clean
        means = frontier.means(lost, stats.seed_of(claim.digest, frontier.target.name, arm))
        rows.append(
            {
                "arm": arm,
                "d_sae": point.d_sae,
                "weights": point.weights,
                "L0": point.total,
                "L0 by head": point.l0,
                "loss recovered": 1 - float(means.estimate[0]),
                "low": 1 - float(means.upper(claim.level, simultaneous=False)[0]),
                "high": 1 - float(means.lower(claim.level, simultaneous=False)[0]),
                "explained variance by head": point.explained,
            }
        )
    return rows


def exchange_rate(frontier: Frontier, dense: str, block: str) -> Mapping[str, float] | None:
    """How many times the L0 of the dense arm the block-diagonal one needs to recover as much: rho, and its logarithm
    to base n_heads (0: totals compare, 1: L0 per head compares). Mean over the shared range of loss; None without one.
    """
    a, b = frontier.points(dense), frontier.points(block)

    def curve(points: Sequence[Point]) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        loss = np.array([point.loss.sum() for point in points])
        order = np.argsort(loss)
        return loss[order], np.log([points[k].total for k in order])

    (loss_a, l0_a), (loss_b, l0_b) = curve(a), curve(b)
    low, high = max(loss_a[0], loss_b[0]), min(loss_a[-1], loss_b[-1])
    if not high > low:
        return None
    grid = np.linspace(low, high, _GRID)
    log_rho = float(np.mean(np.interp(grid, loss_b, l0_b) - np.interp(grid, loss_a, l0_a)))
    return {"rho": float(np.exp(log_rho)), "log rho / log n_heads": log_rho / float(np.log(frontier.n_heads))}
