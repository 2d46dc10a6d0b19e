"""The dictionaries of SmolLM2 as they lie in the clone."""

from __future__ import annotations

import json
from pathlib import Path

from fixtures.smollm2.build import measure, recipe


def test_what_is_shipped_is_what_was_measured_and_the_card_says_it() -> None:
    shipped = Path(measure.__file__).parents[1]
    figures = json.loads((shipped / "figures.json").read_text())
    assert set(figures["dictionaries"]) == {one.folder for one in recipe.DICTIONARIES}
    for folder, row in figures["dictionaries"].items():
        assert measure.sha256(shipped / folder / "sae_weights.safetensors") == row["sha256"], folder
    assert (shipped / "README.md").read_text() == measure.card(figures)
