"""The suite's own settings: shapes and types of `fra` checked at run time, one thread, no hub."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: every model here is made or shipped
os.environ["FRA_NO_CACHE"] = "1"  # tests plant bugs: nothing that they measure is kept for others

import pkgutil

import pytest
from jaxtyping import install_import_hook

import fra

# `fra` alone would cover `fra.tests` too. What the plugins of fixtures/ imported before this file is not covered.
LIBRARY = [m.name for m in pkgutil.walk_packages(fra.__path__, "fra.") if not m.name.startswith("fra.tests")]
install_import_hook(LIBRARY, "beartype.beartype")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Two threads beside a busy second core make every small operation many times slower."""
    import torch

    torch.set_num_threads(1)
