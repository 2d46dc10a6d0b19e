"""Indirect object identification (IOI): prompts with edits of their template, and which features at S2 they rest on.

"Then, Mary and John went to the store. John gave a ring to" should go on with " Mary", the indirect object (IO), not
with the subject (S). S2 is the subject's second mention (Wang et al. 2023). An edit puts another word for " and".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.attribution.head_outputs import observe
from fra.core.weights import Model
from fra.dictionaries.codes import dictionary_hook
from fra.dictionaries.hooks import is_output
from fra.errors import FraError
from fra.interventions.patching import ablate_features, own_positions
from fra.measures.head_outputs.designs import IndirectObjects
from fra.statistics.stats import Floats, seed_of
from fra.verdicts.claim import Claim, Evidence
from fra.verdicts.decide import WHOLE, Beside, Sampled, decide, means_of

if TYPE_CHECKING:
    from fra.targets.target import Target

NAMES = (
    "Mary", "John", "Tom", "James", "Anna", "Paul", "Sarah", "Peter", "Alice", "George",
    "Jane", "Henry", "David", "Emma", "Charles", "Kate", "William", "Lucy", "Robert", "Ruth",
)  # fmt: skip
CONJUNCTIONS = (" and", " or", " but", " alongside")
TEMPLATES = (
    ("Then,{A}{and}{B} went to the", "{place}.{S} gave a", "{thing} to"),
    ("When{A}{and}{B} had at last come back from the", "{place},{S} handed a", "{thing} to"),
    ("One day{A}{and}{B} were seen together at the old", "{place},{S} sent a", "{thing} to"),
)
PLACES = (" house", " church", " garden", " station", " market")
THINGS = (" book", " letter", " ring", " hat", " glass")
_PROMPTS_AT_ONCE = 32
MATCHED = "over matched features"
PREFERENCE = "logit difference over its standard error"
"""The gate: a model that does not prefer the indirect object has no IOI to show."""


@dataclass(frozen=True)
class IOIPrompts:
    """Prompts, padded on the right with their first token; positions are each prompt's own."""

    tokens: Int[Tensor, "n pos"]
    s2: Int[Tensor, " n"]
    end: Int[Tensor, " n"]
    """The last token, which predicts the name."""
    conjunction: Int[Tensor, " n"]
    """Position of the word between the names."""
    io: Int[Tensor, " n"]
    subject: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, some: slice) -> IOIPrompts:
        """Some of them."""
        return IOIPrompts(*(getattr(self, name)[some] for name in self.__dataclass_fields__))


def single_names(encode: Callable[[str], list[int]]) -> list[str]:
    """The names that are one token, with their space."""
    return [name for name in NAMES if len(encode(" " + name)) == 1]


def lacking(encode: Callable[[str], list[int]], least: int) -> str | None:
    """Why a tokenizer cannot take these prompts, in a sentence; None where it can. least: names that are one token."""
    names = single_names(encode)
    if len(names) < least:
        return f"{len(names)} of the {len(NAMES)} names are single tokens for this target, where {least} are needed"
    split = [word for word in CONJUNCTIONS[:1] if len(encode(word)) != 1]
    return f"{split[0]!r} is no single token for this target" if split else None


def ioi_prompts(
    encode: Callable[[str], list[int]],
    bos: int | None,
    seed_parts: Sequence[str],
    design: IndirectObjects,
    conjunction: str = " and",
) -> IOIPrompts:
    """The design's prompts, both orders of the names in turn; the same but for the word for every `conjunction`.

    Raises FraError where the tokenizer does not split a prompt between words, or `lacking` says why not.
    """
    if (why := lacking(encode, design.names)) is not None:
        raise FraError(f"{why}: no IOI prompts can be made")
    rng = np.random.default_rng(seed_of(*seed_parts))
    names = single_names(encode)
    rows: list[list[int]] = []
    marks: list[dict[str, int]] = []
    for number in range(design.prompts):
        io, subject = (" " + name for name in rng.choice(names, 2, replace=False))
        first = number % 2 == 0
        words = {
            "{A}": io if first else subject,
            "{B}": subject if first else io,
            "{S}": subject,
            "{and}": conjunction,
            "{place}": str(rng.choice(PLACES)),
            "{thing}": str(rng.choice(THINGS)),
        }
        pieces = _pieces("".join(TEMPLATES[int(rng.integers(len(TEMPLATES)))]), words)
        ids = [] if bos is None else [bos]
        at: dict[str, int] = {}
        for mark, text in pieces:
            at.setdefault(mark, len(ids))
            ids += encode(text)
        whole = ([] if bos is None else [bos]) + encode("".join(text for _, text in pieces))
        if ids != whole:
            raise FraError("this tokenizer joins words of an IOI prompt, so that positions cannot be told")
        rows.append(ids)
        marks.append(
            {
                "s2": at["{S}"],
                "end": len(ids) - 1,
                "conjunction": at["{and}"],
                "io": encode(io)[0],
                "subject": encode(subject)[0],
            }
        )
    longest = max(map(len, rows))
    tokens = torch.tensor([row + row[:1] * (longest - len(row)) for row in rows])
    return IOIPrompts(tokens, **{name: torch.tensor([own[name] for own in marks]) for name in marks[0]})


def _pieces(template: str, words: dict[str, str]) -> list[tuple[str, str]]:
    """(mark or "", text) of a template, in order."""
    found: list[tuple[str, str]] = []
    while template:
        here = {mark: template.find(mark) for mark in words if mark in template}
        if not here:
            found.append(("", template))
            break
        mark = min(here, key=lambda name: here[name])
        if here[mark]:
            found.append(("", template[: here[mark]]))
        found.append((mark, words[mark]))
        template = template[here[mark] + len(mark) :]
    return found


@torch.no_grad()
def logit_differences(model: Model, prompts: IOIPrompts, hooks: Sequence[Any] = ()) -> Floats:
    """Logit of the indirect object less that of the subject at each prompt's own last token."""
    home = next(model.parameters()).device
    parts = []
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        here = slice(start, start + _PROMPTS_AT_ONCE)
        some = prompts.part(here)
        with model.hooks(fwd_hooks=[h(here) if callable(h) else h for h in hooks]):
            logits = model(some.tokens.to(home))
        every = torch.arange(len(some), device=home)
        last = logits[every, some.end.to(home)]
        parts.append(last[every, some.io.to(home)] - last[every, some.subject.to(home)])
    return np.asarray(torch.cat(parts).double().cpu())


def ablated_at_s2(
    model: Model, dictionary: Any, prompts: IOIPrompts, features: Sequence[int] | Int[Tensor, " n"]
) -> Floats:
    """Logit differences with these features taken out of the dictionary's hook at each prompt's own S2, error kept."""
    ids = torch.as_tensor(features)

    def hook(some: slice) -> Any:
        rows = own_positions(prompts.s2[some], prompts.tokens.shape[1])
        return ablate_features(model, ids, dictionary, rows=rows).hooks[0]

    return logit_differences(model, prompts, [hook])


@dataclass(frozen=True)
class ChosenFeatures:
    """What the choosing prompts say of one dictionary."""

    dictionary: Any
    joint: float
    """Mean fall of the logit difference when every feature is taken out at S2."""
    few: list[int]
    matched: list[int]
    """As many others, nearest in mean activation at S2."""
    falls: dict[int, float]


def choose(model: Model, dictionary: Any, prompts: IOIPrompts, design: IndirectObjects) -> ChosenFeatures | None:
    """The few features whose ablation at S2 lowers the logit difference most, and as many matched ones; None where not
    so many are live.
    """
    count, total = at_s2(model, dictionary, prompts)
    ids = torch.argsort(count, descending=True, stable=True)[: design.screened]
    ids = ids[count[ids] > 0]
    if len(ids) < 2 * design.few:
        return None
    clean = logit_differences(model, prompts)
    falls = {int(i): float((clean - ablated_at_s2(model, dictionary, prompts, [int(i)])).mean()) for i in ids}
    few = sorted(falls, key=lambda i: -falls[i])[: design.few]
    rest = [int(i) for i in ids if int(i) not in few]
    matched: list[int] = []
    for i in few:
        near = min((j for j in rest if j not in matched), key=lambda j: abs(float(total[j] - total[i])))
        matched.append(near)
    joint = float((clean - ablated_at_s2(model, dictionary, prompts, count.nonzero()[:, 0])).mean())
    return ChosenFeatures(dictionary, joint, few, matched, falls)


def at_s2(model: Model, dictionary: Any, prompts: IOIPrompts) -> tuple[Int[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    """At each prompt's own S2: on how many prompts every feature is live, and the sum of its activations."""
    seen = observe(model, dictionary, prompts.tokens)
    at = seen.live.where(seen.live.pos == prompts.s2.to(seen.live.pos.device)[seen.live.doc])
    count = torch.bincount(at.feature, minlength=seen.encoder.d_sae).cpu()
    total = torch.zeros(len(count), dtype=torch.float64).index_add_(0, at.feature.cpu(), at.value.double().cpu())
    return count, total


def best_dictionary(target: Target, prompts: IOIPrompts, design: IndirectObjects) -> ChosenFeatures | None:
    """Of the dictionaries of head outputs the one whose features matter most at S2 on the choosing prompts; None where
    taking them out lowers no logit difference.
    """
    first = prompts.part(slice(0, design.choosing))
    hooks = [hook for hook in target.dictionaries if is_output(hook)]
    found = [choose(target.model, target.dictionaries[hook], first, design) for hook in hooks]
    best = max((c for c in found if c is not None), key=lambda c: c.joint, default=None)
    return None if best is None or best.joint <= 0 else best


def ioi_evidence(claim: Claim, target: Target, progress: Callable[[str], None] = lambda _: None) -> Evidence:
    """D15 on a target with head-output dictionaries: one row."""
    design = claim.designed(IndirectObjects)
    if not any(is_output(hook) for hook in target.dictionaries):
        return Evidence(claim=claim, head=None, cannot="the target has no dictionary of head outputs")
    if (why := lacking(target.encode, design.names)) is not None:
        return Evidence(claim=claim, head=None, cannot=why)
    model, seeds = target.model, (target.name, "ioi")
    try:
        made = {word: ioi_prompts(target.encode, target.bos, seeds, design, word) for word in CONJUNCTIONS}
    except FraError as error:  # words that this tokenizer joins
        return Evidence(claim=claim, head=None, cannot=str(error))
    rest = slice(design.choosing, None)
    base = made[" and"].part(rest)
    clean = logit_differences(model, base)
    accuracy = {"logit difference": float(clean.mean()), "prompts in favour of the IO": float((clean > 0).mean())}
    if not clean.mean() > claim.gates[PREFERENCE] * clean.std(ddof=1) / len(clean) ** 0.5:
        said = f"the model does not prefer the indirect object (logit difference {clean.mean():.2f}): no IOI to show"
        return Evidence(claim=claim, head=None, undecided=said, detail=accuracy)
    progress(f"{claim.id}: features at S2")
    best = best_dictionary(target, made[" and"], design)
    if best is None:
        said = "no layer's features at S2 raise the logit difference on the choosing prompts"
        return Evidence(claim=claim, head=None, undecided=said, detail=accuracy)
    # what is live at S2 on these prompts, not on those that chose: all of it is to be taken out
    every = torch.unique(torch.cat([at_s2(model, best.dictionary, base)[0].nonzero()[:, 0], torch.tensor(best.few)]))
    sets = {"few": best.few, "matched": best.matched, "every": every}
    falls = {name: clean - ablated_at_s2(model, best.dictionary, base, ids) for name, ids in sets.items()}
    edited = {word: clean - logit_differences(model, prompts.part(rest)) for word, prompts in made.items()}
    few, alongside = falls["few"], edited[" alongside"]
    parts = {
        claim.condition: (few, falls["every"]),
        MATCHED: (few - falls["matched"], few),
        "' alongside', as a share of the ablation": (alongside, few),
        "' alongside' over ' or'": (alongside - edited[" or"], few),
        "' alongside' over ' but'": (alongside - edited[" but"], few),
    }
    columns = [
        Sampled(
            name=name,
            samples={WHOLE: means_of(claim, target.name, WHOLE, name, part - claim.bar_of(name) * whole)},
            shares={WHOLE: (float(part.mean()), float(whole.mean()))},
        )
        for name, (part, whole) in parts.items()
    ]
    baseline = float(few.mean())
    beside = Beside(
        candidates=(f"{len(best.few)} features of {dictionary_hook(best.dictionary)}",),
        detail=accuracy
        | {
            "features": best.few,
            "matched": best.matched,
            "fall by ablation": {name: float(value.mean()) for name, value in falls.items()},
            "recovery, 1 as with ' and', 0 as ablated": {
                word: 1 - float(value.mean()) / baseline if baseline else None for word, value in edited.items()
            },
            "falls on the choosing prompts": {str(i): value for i, value in best.falls.items()},
        },
    )
    return decide(claim, columns, {WHOLE: beside}, q_over=())[WHOLE]
