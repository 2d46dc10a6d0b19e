"""Studies of block-diagonal dictionaries: of random ones on a random model, and frontiers whose points are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens.saes.sae import SAEMetadata

import fra
from fra.claim import Claim
from fra.dictionaries.blockdiag import BlockDiagonalSAE, BlockDiagonalSAEConfig
from fra.measures.block_diagonal.frontier import Frontier, Point
from fra.targets.target import Target
from fra.tests.claims import claim as declared
from fra.tests.models import D_MODEL, build_sae, model_folder
from fra.tests.tiny_targets import HEAD_OUTPUT, write_target, write_text

HEADS, D_HEAD = 4, D_MODEL // 4
TEXTS = {f"{s}-{k}": f"{w} and {v} make more than {w}, said {v}. " * (2 + k) for k in range(3) for s, w, v in
         (("a", "one", "two"), ("b", "three", "four"), ("c", "five", "six"), ("d", "seven", "one"))}  # fmt: skip


def claim(name: str = "B03.width", **options: Any) -> Claim:
    """A claim with its bars, on few documents."""
    return declared(name, **{"min_sources": 5, **options})


def block_folder(folder: Path, seed: int = 0, **options: Any) -> Path:
    torch.manual_seed(seed)
    metadata = SAEMetadata(hook_name=HEAD_OUTPUT, model_name="tiny")
    config = {"d_in": D_MODEL, "d_sae": 2 * D_MODEL, "n_heads": HEADS, "reshape_activations": "hook_z"}
    BlockDiagonalSAE(
        BlockDiagonalSAEConfig(**config, **options, metadata=metadata, rescale_acts_by_decoder_norm=True)
    ).save_model(folder)
    return folder


def study_target(folder: Path) -> Target:
    """A random model with a study of random dictionaries of head outputs."""
    text = write_text(folder / "text", TEXTS)
    file = write_target(folder, model_folder("gpt2"), {}, text)
    arms = {"block-width": [block_folder(folder / f"b{k}", k=k) for k in (1, 2, 4)]}
    arms["dense"] = [
        build_sae("topk", D_MODEL, HEAD_OUTPUT, folder / f"d{k}", k=k, reshape_activations="hook_z") for k in (3, 9)
    ]
    with file.open("a") as out:
        for arm, paths in arms.items():
            for path in paths:
                out.write(f'[[study]]\narm = "{arm}"\nhook = "{HEAD_OUTPUT}"\npath = "{path.name}"\n')
    return fra.load_target(file)


class PlantedFrontier(Frontier):
    """A frontier of given points: 60 sources, zero ablation a nat a token, 10 tokens a document; training runs whose
    arms recover more or less by `between` (standard deviation).
    """

    def __init__(
        self,
        arms: dict[str, list[tuple[float, float]]],
        spread: float = 0.02,
        gap: float = 1.0,
        runs: int = 3,
        between: float = 0.002,
        seed: int = 0,
    ) -> None:
        made = {(arm, run): points for run in range(runs) for arm, points in arms.items()}
        entries = [type("E", (), {"arm": arm, "run": run})() for (arm, run), points in made.items() for _ in points]
        self.target = type("T", (), {"name": "planted", "spec": type("S", (), {"study": entries})()})()  # type: ignore[assignment]
        self.target.runs = lambda arm: list(range(runs))  # type: ignore[method-assign]
        self.n_heads, n = 8, 60
        rng = np.random.default_rng(seed)
        self.measured, self.sources = [torch.zeros(11)] * n, [str(k) for k in range(n)]
        self.clean, self.gap = np.full(n, 20.0), np.full(n, 10.0 * gap)
        shared = rng.normal(0, 1, n)  # what is hard in a document is hard for every dictionary
        self._points = {}
        for key, points in made.items():
            run = rng.normal(0, between)
            self._points[key] = [
                Point(
                    np.full(8, l0 / 8),
                    20 + 10 * (1 - recovered - run) + shared + rng.normal(0, 10 * spread, n),
                    np.zeros(8), 512, 1,
                )
                for l0, recovered in points
            ]  # fmt: skip


DENSE = [(8.0, 0.80), (16.0, 0.85), (32.0, 0.90)]
