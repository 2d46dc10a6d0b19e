"""The suite's own words: what they mean, where they stand in a page."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

from fra.report.tokens import visible

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

_WORD = re.compile(rf"\b({'|'.join(GLOSSARY)})(?:s|es|d)?\b")


def glossed(text: str) -> Markup:
    """The text, escaped, with its meaning on hover where a word of the glossary stands in it for the first time."""
    shown, parts, end, met = visible(text), [], 0, set[str]()
    for found in _WORD.finditer(shown):
        word = found[1]
        if word not in met:
            met.add(word)
            abbreviation = Markup('<abbr title="{}">{}</abbr>').format(GLOSSARY[word], found[0])
            parts += [escape(shown[end : found.start()]), abbreviation]
            end = found.end()
    return Markup("").join([*parts, escape(shown[end:])])
