"""IOI prompts by their words, and the measure against the model's own hooks."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fra.claim import Outcome, judge
from fra.errors import FraError
from fra.interventions import patching
from fra.measures.head_outputs import d15_ioi
from fra.measures.head_outputs.designs import IndirectObjects
from fra.tests.claims import claim
from fra.tests.models import tiny, tiny_sae

CLAIM = claim("D15")
DESIGN = IndirectObjects()


def of(n: int) -> IndirectObjects:
    """So many prompts."""
    return dataclasses.replace(DESIGN, prompts=n)


class Words:
    """A tokenizer of whole words, each with its space and without its punctuation."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, text: str) -> list[int]:
        for mark in (",", "."):
            text = text.replace(mark, f"\0{mark}")
        words = text.replace(" ", "\0 ").split("\0")
        return [self.ids.setdefault(word, len(self.ids) + 1) for word in words if word]

    def read(self, ids: list[int]) -> str:
        word = {number: text for text, number in self.ids.items()}
        return "".join(word.get(number, "") for number in ids)


def test_prompts_say_what_they_should() -> None:
    encode = Words()
    made = {word: d15_ioi.ioi_prompts(encode, 0, ("x",), of(40), word) for word in d15_ioi.CONJUNCTIONS}
    base = made[" and"]
    io_first = 0
    for n in range(40):
        ids = base.tokens[n, : int(base.end[n]) + 1].tolist()
        text, io, s = encode.read(ids), encode.read([int(base.io[n])]), encode.read([int(base.subject[n])])
        assert text.count(s) == 2
        assert text.count(io) == 1
        assert text.endswith(" to")
        io_first += text.index(io) < text.index(s)
        assert ids[int(base.s2[n])] == int(base.subject[n])
        assert ids.index(int(base.subject[n])) < int(base.s2[n])  # the second mention
        assert encode.read([ids[int(base.conjunction[n])]]) == " and"
        for word, other in made.items():
            theirs = encode.read(other.tokens[n, : int(other.end[n]) + 1].tolist())
            assert theirs == text.replace(" and", word)  # the edit is all that differs
    assert io_first == 20
    assert len({int(x) for x in base.s2}) > 1


def test_a_tokenizer_that_cannot_take_them_says_so() -> None:
    letters: Any = lambda text: [ord(c) for c in text]  # noqa: E731
    assert (
        d15_ioi.lacking(letters, DESIGN.names)
        == "0 of the 20 names are single tokens for this target, where 8 are needed"
    )
    with pytest.raises(FraError, match="single tokens"):
        d15_ioi.ioi_prompts(letters, 0, ("x",), DESIGN)
    joined = Words()

    def joins(text: str) -> list[int]:
        return joined(text.replace(" went to", "_went_to") if text.startswith("Then") else text)

    with pytest.raises(FraError, match="joins words"):
        d15_ioi.ioi_prompts(joins, 0, ("x",), DESIGN)
    target: Any = SimpleNamespace(
        name="tiny", dictionaries={"blocks.1.attn.hook_z": None}, encode=letters, model=None, bos=0
    )
    assert judge(CLAIM, d15_ioi.ioi_evidence(CLAIM, target)).outcome is Outcome.CANNOT_RUN
    target.encode = joins
    joined_words = judge(CLAIM, d15_ioi.ioi_evidence(CLAIM, target))
    assert joined_words.outcome is Outcome.CANNOT_RUN and "joins words" in joined_words.reason
    target.dictionaries = {"blocks.1.ln1.hook_normalized": None}
    assert "no dictionary of head outputs" in str(judge(CLAIM, d15_ioi.ioi_evidence(CLAIM, target)).reason)


def test_features_are_taken_out_at_each_prompts_own_s2() -> None:
    model, sae = tiny("gpt2"), tiny_sae("blocks.0.attn.hook_z")
    prompts = d15_ioi.ioi_prompts(Words(), 0, ("x",), of(36))  # more than one batch
    z = model.run_with_cache(prompts.tokens, names_filter=["blocks.0.attn.hook_z"])[1]["blocks.0.attn.hook_z"]
    acts = sae.encode(z.flatten(2)).to_dense()
    every = torch.arange(36)
    feature = int((acts[every, prompts.s2] > 0).sum(0).argmax())
    found = d15_ioi.ablated_at_s2(model, sae, prompts, [feature])
    clean = d15_ioi.logit_differences(model, prompts)
    for n in (0, 35):
        tokens = prompts.tokens[n : n + 1]
        rows = patching.own_positions(prompts.s2[n : n + 1], tokens.shape[1])
        with patching.ablate_features(model, [feature], sae, rows=rows), torch.no_grad():
            last = model(tokens)[0, int(prompts.end[n])]
        truth = float(last[prompts.io[n]] - last[prompts.subject[n]])
        assert found[n] == pytest.approx(truth, abs=1e-5)
    assert np.abs(found - clean).max() > 1e-3
    union = torch.zeros_like(prompts.tokens, dtype=torch.bool)
    union[:, prompts.s2.unique()] = True
    with patching.ablate_features(model, [feature], sae, rows=union[:32]):
        wrong = d15_ioi.logit_differences(model, prompts.part(slice(0, 32)))
    assert np.abs(wrong - found[:32]).max() > 1e-4, "the union of positions would not be noticed"


@torch.no_grad()
def test_a_model_that_prefers_the_indirect_object_is_measured_and_another_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode, base = Words(), tiny("gpt2")
    d15_ioi.ioi_prompts(encode, 0, ("x",), DESIGN)  # all words have their ids now
    sae = tiny_sae("blocks.0.attn.hook_z")
    target: Any = SimpleNamespace(
        name="tiny", model=base, dictionaries={"blocks.0.attn.hook_z": sae}, encode=encode, bos=0, n_layers=2
    )
    found = d15_ioi.ioi_evidence(CLAIM, target)
    assert found.undecided is not None
    assert "does not prefer" in found.undecided
    chosen = d15_ioi.choose(base, sae, d15_ioi.ioi_prompts(encode, 0, ("x",), of(12)), DESIGN)
    assert chosen is not None
    assert len(chosen.few) == len(chosen.matched) == DESIGN.few
    assert not set(chosen.few) & set(chosen.matched)
    assert min(chosen.falls[i] for i in chosen.few) >= max(v for i, v in chosen.falls.items() if i not in chosen.few)

    own = d15_ioi.logit_differences
    monkeypatch.setattr(d15_ioi, "logit_differences", lambda *given: own(*given) + 30.0)
    found = d15_ioi.ioi_evidence(CLAIM, target)
    if found.undecided is None:
        (conditions,) = found.candidates.values()
        names = ["over matched features", "' alongside', as a share of the ablation"]
        names += ["' alongside' over ' or'", "' alongside' over ' but'"]
        assert set(names) == set(CLAIM.bars)
        assert [c.name for c in conditions] == [CLAIM.condition, *names]
        assert found.detail["recovery, 1 as with ' and', 0 as ablated"][" and"] == 1.0
    assert found.detail["prompts in favour of the IO"] == 1.0


@torch.no_grad()
def test_every_feature_at_s2_is_what_is_live_on_the_measured_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    encode, model, sae = Words(), tiny("gpt2"), tiny_sae("blocks.0.attn.hook_z")
    prompts = d15_ioi.ioi_prompts(encode, 0, ("tiny", "ioi"), DESIGN)
    measured = prompts.part(slice(DESIGN.choosing, None))
    own, whole = d15_ioi.logit_differences, torch.arange(sae.cfg.d_sae)
    truth = own(model, measured) - d15_ioi.ablated_at_s2(model, sae, measured, whole)  # what is not live adds nothing
    some = d15_ioi.choose(model, sae, prompts.part(slice(0, 4)), DESIGN)
    assert some is not None
    monkeypatch.setattr(d15_ioi, "choose", lambda *_: dataclasses.replace(some, joint=1.0))
    monkeypatch.setattr(d15_ioi, "logit_differences", lambda *given: own(*given) + 30.0)
    target: Any = SimpleNamespace(
        name="tiny", model=model, dictionaries={"blocks.0.attn.hook_z": sae}, encode=encode, bos=0, n_layers=2
    )
    found = d15_ioi.ioi_evidence(CLAIM, target)
    assert found.detail["fall by ablation"]["every"] == pytest.approx(truth.mean(), abs=1e-5)
    live, total = d15_ioi.at_s2(model, sae, prompts.part(slice(0, 4)))
    assert (live > 0).sum() < (d15_ioi.at_s2(model, sae, measured)[0] > 0).sum(), "four prompts show all there is"
    assert torch.equal(live > 0, total != 0)


@torch.no_grad()
def test_features_are_chosen_whatever_is_measured() -> None:
    encode, model, sae = Words(), tiny("gpt2"), tiny_sae("blocks.0.attn.hook_z")
    prompts = d15_ioi.ioi_prompts(encode, 0, ("tiny", "ioi"), DESIGN)
    others = d15_ioi.ioi_prompts(encode, 0, ("others",), DESIGN)
    rest = slice(DESIGN.choosing, None)
    # not wider than the first ones: padding would change sums by rounding
    tokens = prompts.tokens.clone()
    tokens[rest] = others.tokens[rest, : tokens.shape[1]]
    marks = {name: getattr(prompts, name).clone() for name in ("s2", "end", "conjunction", "io", "subject")}
    for name, own in marks.items():
        own[rest] = getattr(others, name)[rest].clamp(max=tokens.shape[1] - 1)
    exchanged = d15_ioi.IOIPrompts(tokens, **marks)
    assert not torch.equal(exchanged.tokens[rest], prompts.tokens[rest])
    target: Any = SimpleNamespace(model=model, dictionaries={"blocks.0.attn.hook_z": sae})
    one, other = (
        d15_ioi.choose(model, sae, each.part(slice(0, DESIGN.choosing)), DESIGN) for each in (prompts, exchanged)
    )
    assert one is not None and other is not None
    found = [d15_ioi.best_dictionary(target, each, DESIGN) for each in (prompts, exchanged)]
    assert one.few == other.few and one.matched == other.matched and one.falls == other.falls
    if one.joint > 0:
        assert all(each is not None and each.few == one.few and each.falls == one.falls for each in found)
    else:
        assert found == [None, None]
