"""Features and channels of an attention-input dictionary as pages: a page a channel, a page a head with all its
features, cards of features a hundred a page, and an index in which one jumps to a number.

Every token and label is text: escaped, control characters shown as escapes. Which token is the query and which the key
is told by an outline and a letter, never by colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from markupsafe import Markup, escape

from fra.report import card_links
from fra.report.card_pages import CardExample, pages_of
from fra.report.tokens import AROUND, BEFORE, SHADES
from fra.verdicts import files
from fra.verdicts.shown import visible

ON_A_PAGE = 100
"""Features of one page of cards."""


@dataclass(frozen=True)
class Partner:
    """The other feature of a channel, in one head."""

    feature: int
    mean: float
    """Of F_ij over the pairs of positions at which both features are live."""
    count: int


@dataclass(frozen=True)
class FeatureCard:
    """What is known of one feature."""

    feature: int
    density: float
    """Share of positions on which it fires."""
    documents: int
    largest: float
    histogram: Sequence[int]
    edge: float
    examples: Sequence[CardExample]
    as_query: Mapping[int, Sequence[Partner]]
    """By head: its strongest key features."""
    as_key: Mapping[int, Sequence[Partner]]
    """By head: its strongest query features."""

    def strongest(self, head: int) -> float:
        """The largest |mean| among its partners in one head; 0 without one."""
        sides = (*self.as_query.get(head, ()), *self.as_key.get(head, ()))
        return max((abs(partner.mean) for partner in sides), default=0.0)


@dataclass(frozen=True)
class Context:
    """One contribution of a channel."""

    tokens: Sequence[str]
    document: int
    q_pos: int
    k_pos: int
    value: float

    def text(self) -> Markup:
        """The text around key and query, both outlined and lettered; what lies between is left out where it is long."""
        near = range(max(0, self.k_pos - BEFORE), min(len(self.tokens), self.k_pos + AROUND + 1))
        far = range(max(0, self.q_pos - BEFORE), min(len(self.tokens), self.q_pos + AROUND + 1))
        shown = sorted({*near, *far})
        parts = [Markup("… ")] if shown[0] > 0 else []
        for at, after in zip(shown, [*shown[1:], None], strict=True):
            token = escape(visible(self.tokens[at]))
            marks = [name for name, place in (("query", self.q_pos), ("key", self.k_pos)) if at == place]
            for name in marks:
                token = Markup('<b class="{}">{}<sub>{}</sub></b>').format(name, token, name[0])
            parts.append(token)
            if after is not None and after > at + 1:
                parts.append(Markup(' <span class="quiet">… {} tokens …</span> ').format(after - at - 1))
        if shown[-1] < len(self.tokens) - 1:
            parts.append(Markup(" …"))
        return Markup("").join(parts)


@dataclass(frozen=True)
class InHead:
    """A channel in one head, over all pairs of positions at which both features are live."""

    head: int
    count: int
    mean: float
    total: float
    largest: float
    """The contribution of the largest size, with its sign."""
    rank: int | None
    """Its place among the head's channels by |mean|, from 1; None where it is not among those that were ranked."""
    coupling: Sequence[float]
    """G_ij; with rotary positions at each of the offsets."""


@dataclass(frozen=True)
class ChannelCard:
    """What is known of one channel, a query and a key feature of one dictionary."""

    q_feature: int
    k_feature: int
    heads: Sequence[InHead]
    """Every head of the layer, the largest |mean| first."""
    contexts: Sequence[Context]
    """The strongest of the first of `heads`, one a document."""

    @property
    def name(self) -> str:
        """As a ledger writes it."""
        return f"{self.q_feature} -> {self.k_feature}"


@dataclass(frozen=True)
class QueryKeyCards:
    """What the pages of one dictionary show."""

    target: str
    hook: str
    layer: int
    n_heads: int
    d_sae: int
    n_documents: int
    n_positions: int
    min_count: int
    """Pairs of positions that a channel needs to be ranked by its mean."""
    ranked: int
    """Channels of a head that partners come from, at most."""
    offsets: Sequence[int]
    """At which G is given; empty where it does not turn with the distance."""
    gains: bool
    """Whether a QK-norm multiplies F besides G."""
    features: Mapping[int, FeatureCard]
    channels: Mapping[tuple[int, int], ChannelCard]
    of_head: Mapping[int, Sequence[tuple[int, int]]]
    """By head: the channels that were chosen for it, the largest |mean| first."""
    labels: Mapping[int, str] = field(default_factory=dict)

    def page_of(self, feature: int) -> str:
        """The address of a feature's card."""
        return f"features-{feature // ON_A_PAGE * ON_A_PAGE}.html"

    @cached_property
    def on_page(self) -> dict[str, list[int]]:
        """The features of each page of cards."""
        pages: dict[str, list[int]] = {}
        for feature in sorted(self.features):
            pages.setdefault(self.page_of(feature), []).append(feature)
        return pages

    def of(self, head: int) -> list[FeatureCard]:
        """All features in one head, the strongest first."""
        return sorted(self.features.values(), key=lambda card: (-card.strongest(head), card.feature))


def channel_page(q_feature: int, k_feature: int) -> str:
    """The address of a channel's page within its folder."""
    return f"c{q_feature}-{k_feature}.html"


def write_pages(found: QueryKeyCards, folder: Path, *, fingerprint: str = "", report: Path | None = None) -> int:
    """All pages of one dictionary; returns how many. Beside them lies which feature and channel stands where, for a
    report's links. Raises FraError where the folder cannot be written.

    fingerprint: of the target; without it no report links the cards. report: the pages link back to it.
    """
    back = "" if report is None else card_links.relative(report, folder / "index.html")
    template = pages_of("channels.html.j2")

    def write(name: str, what: str, **of_page: object) -> None:
        shown = template.render(
            found=found, what=what, report=back, shades=range(1, SHADES + 1), channel_page=channel_page, **of_page
        )
        files.write_text(shown, folder / name)

    for page, features in found.on_page.items():
        write(page, "features", cards=[found.features[feature] for feature in features])
    for head in range(found.n_heads):
        write(f"L{found.layer}H{head}.html", "head", head=head)
    for (q_feature, k_feature), card in found.channels.items():
        write(channel_page(q_feature, k_feature), "channel", channel=card)
    write("index.html", "index", channel_names=[f"{i}-{j}" for i, j in found.channels])
    about = found.target, fingerprint, found.hook, found.on_page, found.channels, found.labels, found.layer
    card_links.write(folder, *about)
    return 1 + len(found.on_page) + found.n_heads + len(found.channels)
