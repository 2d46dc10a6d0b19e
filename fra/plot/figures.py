"""Figures of a head and of a census, with matplotlib. Every function draws into `ax` where it is given, and returns the
matplotlib object that it drew into: change titles and colours there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fra.errors import FraError
from fra.verdicts.shown import visible

if TYPE_CHECKING:
    from fra._census.result import Census
    from fra.core.resolve import ResolvedHead

_LABELLED = 48
_PULL, _PUSH = "#3b7dd8", "#d8703b"


def _pyplot() -> Any:
    """matplotlib's pyplot. Raises FraError where it is not installed."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise FraError("figures need matplotlib, which is not installed: pip install 'fra[plot]'.") from error
    return pyplot


def _axes(ax: Any, width: float, height: float) -> Any:
    """The axes to draw into."""
    return _pyplot().subplots(figsize=(width, height), layout="constrained")[1] if ax is None else ax


def _texts(m: ResolvedHead) -> list[str]:
    """The document's tokens, or positions where they are not known; a dollar sign is no formula."""
    tokens = map(str, range(m.n_pos)) if m.tokens is None else map(visible, m.tokens)
    return [token.replace("$", r"\$") for token in tokens]


def _edge(m: ResolvedHead, q_pos: int | None, k_pos: int | None) -> tuple[int, int]:
    """The score that is taken apart: as asked, else that of the strongest attention (`ResolvedHead.strongest_edge`)."""
    if (q_pos is None) != (k_pos is None):
        raise FraError("give both q_pos and k_pos, or neither.")
    return m.strongest_edge() if q_pos is None or k_pos is None else (q_pos, k_pos)


def pattern(m: ResolvedHead, *, ax: Any = None) -> Any:
    """Where a head attends on a document: queries downwards, keys to the right. Returns the axes."""
    size = min(10.0, 2.5 + 0.16 * m.n_pos)
    ax = _axes(ax, size, size)
    values = m.attention().cpu().numpy()
    shown = ax.imshow(np.ma.masked_equal(values, 0), cmap="viridis", vmin=0, vmax=max(float(values.max()), 1e-9))
    if m.n_pos <= _LABELLED:
        ticks, texts = range(m.n_pos), _texts(m)
        ax.set_xticks(ticks, texts, rotation=90, fontsize=7)
        ax.set_yticks(ticks, texts, fontsize=7)
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    ax.set_title(f"{m.name}: attention")
    ax.figure.colorbar(shown, ax=ax, label="attention", shrink=0.7)
    return ax


def blocks(m: ResolvedHead, q_pos: int | None = None, k_pos: int | None = None, *, ax: Any = None) -> Any:
    """One score as the sum of its nine blocks, from the first to the total; that of the strongest attention to an
    earlier token that is not the first, where no position is given. Returns the axes.

    Raises FraError for a key that is masked or outside the document.
    """
    q_pos, k_pos = _edge(m, q_pos, k_pos)
    m.pair(q_pos, k_pos)  # refuses positions that have no score
    parts = {" · ".join(name): float(block[q_pos, k_pos]) for name, block in m.blocks().items()}
    total = float(m.scores()[q_pos, k_pos])
    ax = _axes(ax, 6.5, 3.6)
    names, values = [*parts, "the score"], np.array([*parts.values(), total])
    starts = np.array([0.0, *np.cumsum(values[:-2]), 0.0])
    colours = [_PULL if value >= 0 else _PUSH for value in values[:-1]] + ["0.4"]
    ax.barh(names, values, left=starts, color=colours)
    for at, (start, value) in enumerate(zip(starts, values, strict=True)):
        ax.annotate(f"{value:+.2f}", (max(start, start + value), at), (3, 0), textcoords="offset points", va="center")
    ax.margins(x=0.15)
    ax.invert_yaxis()
    ax.axvline(0, color="0.6", lw=0.8)
    ax.set_xlabel("nats")
    ax.set_ylabel("query part · key part")
    texts = _texts(m)
    ax.set_title(f"{m.name}: the score from {texts[q_pos]!r} ({q_pos}) to {texts[k_pos]!r} ({k_pos})")
    return ax


def channels(m: ResolvedHead, n: int = 10, *, ax: Any = None) -> Any:
    """A head's n strongest channels on the document, by their sum over all attended pairs. Returns the axes."""
    found = m.channels(n=n, text=m.tokens is not None)
    rows = found.to_dict("records")
    texts = [(row["q_token"], row["k_token"]) for row in rows] if m.tokens is not None else None
    title = f"{m.name}: the {len(rows)} strongest channels"
    return _channel_bars(rows, texts, title, "sum over attended pairs, in nats", ax)


def census(found: Census, head: int | str | None = None, n: int = 15, *, reduce: Any = None, ax: Any = None) -> Any:
    """The n strongest channels of one head over a census's documents, by one of its reductions (the first where none is
    named). Returns the axes. head: by number or name; may be left out where the census has one.

    Raises FraError as `Census.channels` does.
    """
    if head is None and len(found.heads) > 1:
        raise FraError(f"say which head: the census has {list(found.heads)}.")
    number = found.heads[0] if head is None else head
    table = found.channels(reduce, n, head=number)
    name = number if isinstance(number, str) else f"L{found.layer.weights.layer}H{number}"
    by = reduce or found.reduces[0]
    title = f"{name}: the {len(table)} strongest channels of {found.n_documents} documents"
    return _channel_bars(table.to_dict("records"), None, title, f"{by} over attended pairs", ax)


def _channel_bars(
    rows: Sequence[dict[str, Any]], texts: Sequence[tuple[str, str]] | None, title: str, unit: str, ax: Any
) -> Any:
    ax = _axes(ax, 6.5, 1.2 + 0.28 * len(rows))
    names = []
    for at, row in enumerate(rows):
        name = f"{row['q_feature']} → {row['k_feature']}"
        if texts is not None:
            name += " (" + " → ".join(repr(visible(text)).replace("$", r"\$") for text in texts[at]) + ")"
        names.append(name)
    values = [float(row["value"]) for row in rows]
    ax.barh(range(len(rows)), values, color=[_PULL if value >= 0 else _PUSH for value in values])
    ax.set_yticks(range(len(rows)), names, fontsize=8)
    ax.invert_yaxis()
    ax.axvline(0, color="0.6", lw=0.8)
    ax.set_xlabel(unit)
    ax.set_ylabel("query feature → key feature")
    ax.set_title(title)
    return ax


def head(m: ResolvedHead, q_pos: int | None = None, k_pos: int | None = None, *, n_channels: int = 10) -> Any:
    """A head on a document in one figure: its pattern, one score as a sum (`blocks`), its strongest channels. Returns
    the matplotlib figure.
    """
    edge = _edge(m, q_pos, k_pos)
    pyplot = _pyplot()

    figure = pyplot.figure(figsize=(14, 6.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1))
    pattern(m, ax=left.subplots())
    above, below = right.subplots(2)
    blocks(m, *edge, ax=above)
    channels(m, n_channels, ax=below)
    return figure
