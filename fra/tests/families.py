"""A hand-built induction head whose features were written down, as a target that families can be surveyed on."""

from __future__ import annotations

import dataclasses
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from fra.attribution import planted
from fra.claim import Claim, Evidence
from fra.induction.designs import TokenInduction
from fra.induction.status import HeadStatus
from fra.measures.families.designs import FamilySelection, UpstreamPrompts
from fra.measures.families.families import Families, LayerFamilies
from fra.stimuli import repeated
from fra.stimuli.designs import PlantedTokens, RepeatedSets
from fra.tests import circuit
from fra.tests.claims import claim

HOOK = "blocks.1.attn.hook_z"
TELLS = 44
"""Features of the induction head from this one up are silent: their tokens are left to fill planted passages with."""
WRONG = (5, 6, 7, 8)
"""Features of the induction head that fire wherever the token stands before, match or not: these fail induction."""


def model(strength: float = 20.0) -> Any:
    """fra.tests.circuit with a second head of layer 1 that attends to the position itself and tells its token."""
    made = circuit.model(strength)
    token = torch.arange(circuit.D_VOCAB)
    with torch.no_grad():
        second = made.blocks[1].attn
        second.W_Q[1].zero_()
        second.W_K[1].zero_()
        position = torch.arange(circuit.N_CTX)
        second.W_Q[1, circuit.D_VOCAB + position, position] = 20.0 * circuit.D_VOCAB**0.5
        second.W_K[1, circuit.D_VOCAB + position, position] = 1.0
        second.W_V[1, token, token] = 1.0
        second.W_O[1, token, token] = -0.05
    return made


def dictionary() -> StandardSAE:
    """A feature for each coordinate of hook_z: v says "token v comes by induction" (head 0), D_VOCAB + v "this is v"
    (head 1).
    """
    width = 2 * circuit.D_VOCAB
    sae = StandardSAE(
        StandardSAEConfig(d_in=width, d_sae=width, metadata=SAEMetadata(model_name="circuit", hook_name=HOOK))
    )
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(width))
        sae.W_dec.copy_(torch.eye(width))
        sae.b_enc.fill_(-0.3)
        sae.b_dec.zero_()
        sae.b_enc[TELLS : circuit.D_VOCAB] = -1.5
        for wrong in WRONG:  # half of it is read off the token itself, through the other head: it needs no repeat
            sae.b_enc[wrong] = 10.0
    return sae


def repeater() -> StandardSAE:
    """The same, but features 10 to 39 fire for any of 40 tokens that comes by induction, a little more for their own,
    and raise their own all the same.
    """
    sae, rng = dictionary(), np.random.default_rng(0)
    with torch.no_grad():
        for feature in range(10, 40):
            sae.W_enc[rng.choice(circuit.BOS, 40, replace=False), feature] = 1.0
            sae.W_enc[feature, feature] = 1.05
            sae.b_enc[feature] = -0.9
    return sae


def needing_both(one_in: int = 5) -> StandardSAE:
    """The same, but features of head 0 need the other head as well: they fire where it tells any token but one in
    five.
    """
    sae = dictionary()
    tells = torch.arange(circuit.D_VOCAB) % one_in != 0
    with torch.no_grad():
        sae.W_enc[circuit.D_VOCAB :, :TELLS] = 0.6 * tells[:, None].float()
        sae.b_enc[:TELLS] = -1.3
    return sae


def layer(
    n: int = 60, strength: float = 20.0, sae: StandardSAE | None = None, measured: str = "measurement"
) -> LayerFamilies:
    """The circuit's second layer, with repeated random documents for natural ones. measured: names the documents of
    measurement, all else being equal.
    """
    built, sae = model(strength), dictionary() if sae is None else sae
    target = SimpleNamespace(
        name="circuit",
        model=built,
        dictionaries={HOOK: sae},
        bos=circuit.BOS,
        tokenizer=SimpleNamespace(
            all_special_ids=[circuit.BOS],
            decode=lambda ids: f" {ids[0]}",
            get_vocab=lambda: {str(token): token for token in range(circuit.D_VOCAB)},
        ),
        documents=lambda: texts(measured),
        encode=lambda text, limit=None: [int(word) for word in text.split()][:limit],
        tokens=lambda text, longest=None: torch.tensor([circuit.BOS, *map(int, text.split())][: circuit.N_CTX]),
    )
    pool = np.arange(circuit.BOS)
    made = [
        repeated.repeated_random(n, pool, circuit.N_CTX, circuit.BOS, ("circuit", name))
        for name in ("discovery", measured)
    ]
    discovery, documents = (repeated.collate(part) for part in made)
    return LayerFamilies(target, 1, [0], discovery, documents, pool)


def texts(measured: str, n: int = 40) -> list[Any]:
    """Natural documents of the circuit: random tokens, two documents of each source."""
    rng = np.random.default_rng(len(measured))
    rows = [rng.integers(0, circuit.BOS, circuit.N_CTX - 1) for _ in range(n)]
    return [
        SimpleNamespace(text=" ".join(map(str, row.tolist())), source=f"{measured}-{k // 2:02}")
        for k, row in enumerate(rows)
    ]


def families(made: LayerFamilies | None = None) -> Families:
    """The circuit's families: L1H0 is the induction head, by its own attention on the status documents."""
    made = made or layer()
    shown = {name: "TIH" if name == "L1H0" else "not a TIH" for name in ("L0H0", "L0H1", "L1H0", "L1H1")}
    previous = {name: {"previous": float(name == "L0H0")} for name in shown}
    status = {h: HeadStatus(h, is_, 1.0, 0.9, 1.0, previous[h]) for h, is_ in shown.items()}
    designs = TokenInduction(), RepeatedSets(), FamilySelection(), PlantedTokens()
    return Families("circuit", status, {1: made}, made.pool, designs=designs)


@cache
def made() -> LayerFamilies:
    return layer()


@cache
def whole() -> Families:
    return families(made())


def halves() -> tuple[planted.Planting, planted.Planting]:
    """Both halves of the circuit's planted documents."""
    first, second = made().choosing, made().measured
    assert first is not None
    assert second is not None
    return first, second


def with_design(of: Claim, design: Any) -> Claim:
    """The claim with another design of that class."""
    return dataclasses.replace(of, design=tuple(design if type(d) is type(design) else d for d in of.design))


def upstream_claim() -> Claim:
    """D11 with prompts for which the circuit has tokens enough."""
    return with_design(claim("D11"), UpstreamPrompts(length=14))


def conditions(found: Evidence) -> dict[str, Any]:
    """Of the only candidate, by name."""
    (own,) = found.candidates.values()
    return {c.name: c for c in own}
