"""The suite's own words: what they mean, where they stand in a page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup, escape

from fra.verdicts.shown import visible

GLOSSARY = {
    "TIH": "token induction head: on a repeated passage it attends from a token of the second copy to the token that "
    "followed the same token in the first",
    "CIH": "conceptual induction head, a hypothesis. CIH channel: a pair of features (i, j) of one head; where i is "
    "live at the query, the term F_ij of the score draws attention to the position after an earlier occurrence",
    "channel": "a pair of features (i -> j) of one head: i at the query, j at the key; its contribution to a score is "
    "exact",
    "stripe": "the induction keys of all rows: for each token of the second copy, the key after its first occurrence",
    "nat": "unit of log-probability and log-odds in base e; an odds ratio of 2 is 0.69 nat",
    "candidate": "what the claim could rest on at this head, such as one of the channels that the search found; every "
    "candidate is held against every condition",
    "scramble": "the head with its own key map turned by a random rotation: what the same search finds there is chance",
    "discovery": "documents on which channels are chosen, and on which nothing that is quoted is measured",
}
"""By the word, in the singular."""

GROUPS = {
    "what was measured": "the effect by parts and by document, and other ways to measure it",
    "controls and nulls": "what the same measure gives where nothing should be found: scrambles, random sets, matches",
    "channels and features": "which pairs of features, or features, the verdict rests on or that stand out",
    "the head": "what kind of head this is, and what it does as a whole",
}
"""Groups of a row's details, and what each is, in the order of the page."""
_HELD = {
    "controls and nulls": (
        "random", "scramble", "shuffle", "control", "null", "permut", "planted", "matched", "matches", "base rate",
        "relabelled", "translated", "other lags", "other head", "layer-0", "own sets",
    ),
    "the head": ("status", "head's", "previous-token", "attention to bos", "induction head", "1 / n_heads"),
    "channels and features": ("channel", "feature", "pairs", "swap that", "strongest", "latent"),
}  # fmt: skip
"""Words of a name in `detail` that put it into a group; the first group that has one. A control of features is a
control.
"""


def grouped(detail: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Details by group: (group, what it is, {name: value}); groups without any are left out."""
    own: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
    for key, value in detail.items():
        low = key.lower()
        group = next((name for name, words in _HELD.items() if any(word in low for word in words)), "what was measured")
        own[group][key] = value
    return [(name, GROUPS[name], values) for name, values in own.items() if values]


_WORD = re.compile(rf"\b({'|'.join(GLOSSARY)})(?:s|es|d)?\b")


def glossed(text: str) -> Markup:
    """The text, escaped, with its meaning on hover where a word of the glossary stands in it for the first time.

    >>> str(glossed("two <b> nats"))[:31]
    'two &lt;b&gt; <abbr title="unit'
    """
    shown, parts, end, met = visible(text), [], 0, set[str]()
    for found in _WORD.finditer(shown):
        word = found[1]
        if word not in met:
            met.add(word)
            abbreviation = Markup('<abbr title="{}">{}</abbr>').format(GLOSSARY[word], found[0])
            parts += [escape(shown[end : found.start()]), abbreviation]
            end = found.end()
    return Markup("").join([*parts, escape(shown[end:])])
