"""Designs of what is measured on families of head-output features, for claims to register. Light: no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FamilySelection:
    """Which features are a head's own and which ones match them, from discovery documents alone."""

    share: float = 0.60
    """Of a feature's direct feature attribution, what must come from the head."""
    control_share: float = 0.10
    """A matched feature, and a context feature, has less than this from every induction head of the layer."""
    least_rows: int = 10
    """Rows on which a feature must fire: a floor on activity, never on effects."""
    density_factor: float = 2.0
    """A matched feature fires on as many rows within this factor."""
    matches: int = 20
    """Matched features of each feature, at most: of those with a like density the ones that raise its token most."""
    step: float = 0.02
    """Of the central difference that tells what a direction does to the logits, as a share of the residual's norm."""
    typical: int = 16
    """Documents whose mean last residual is the point at which that is told."""


@dataclass(frozen=True)
class OwnScale:
    """What counts as strong, in units of a feature's scale: its median activation before second occurrences of its own
    token in the half of the planted documents where families are chosen.
    """

    strong: float = 0.5
    """An activation from this much of the scale up is strong."""
    others_below: float = 0.2
    """A feature knows its token if it is strong before less than this share of other tokens' second occurrences ..."""
    own_above: float = 0.5
    """... and before more than this share of those of its own."""
    shown: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25)
    """Strengths whose precision and recall stand beside."""


@dataclass(frozen=True)
class ContextFeatures:
    """Context features and their words, from first copies of discovery documents; and the control of their proxies."""

    near: int = 10
    """A local feature's word lies at most so many tokens back (median); its proxy reaches as far."""
    least_rows: int = 30
    """Rows on which a feature must fire."""
    entries: int = 24
    """Firing rows of a feature, spread over documents, whose sources are looked at."""
    source_share: float = 0.5
    """Of these, the share that must have the same token at the strongest source."""
    most: int = 40
    """Features of a layer and kind, those with the highest such share first."""
    upper: float = 0.8
    """Upper activations: from this quantile of those on discovery documents up."""
    permutations: int = 20
    """Times that the positions of every document are permuted; each document has its own."""


@dataclass(frozen=True)
class AblatedPairs:
    """Features taken out of documents that hold their token."""

    pairs: int = 120
    """(Document, feature) pairs of a head, each in a document of its own as far as there are so many; and as many with
    a matched feature in the same document, drawn anew for each.
    """


@dataclass(frozen=True)
class UpstreamPrompts:
    """Prompts "... A B ... A" for patching what stands upstream."""

    chosen: int = 40
    """Prompts that say which other head does most."""
    measured: int = 100
    """Prompts that give the numbers."""
    length: int = 24
    """Tokens of a prompt."""
    first_from: int = 3
    """The first A stands at this position or later ..."""
    last_before: int = 6
    """... and so many tokens before the end or earlier."""
    told: float = 2.0
    """Standard errors by which what the match makes must exceed zero, before a share of it is asked for."""


@dataclass(frozen=True)
class NeedingFeatures:
    """Features that might need a head without induction, and the natural documents that they are measured on."""

    candidates: int = 10
    """Features that fail induction, at most: the most active on discovery documents."""
    fails_level: float = 0.05
    """A feature fails induction where the upper bound of its hit rate at this level is below what passes."""
    least_documents: int = 10
    """Discovery documents in which it must fire on rows whose token has not stood before."""
    documents: int = 120
    """Natural documents, one of each source; none of a source of the discovery documents."""
    longest: int = 96
    """Tokens of a document, at most."""


@dataclass(frozen=True)
class Prefixes:
    """Examples with matching prefixes of every length."""

    longest: int = 9
    """Matching tokens, at most."""
    filler: int = 12
    """Random tokens around the first copy."""
    margin: int = 2
    """Of them, so many at least on either side."""
    chosen: int = 40
    """Examples that say which two heads are compared."""
    measured: int = 120
    """Examples that give the numbers."""
