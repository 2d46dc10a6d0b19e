"""Architectures that are registered for one test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from transformer_lens.model_bridge import TransformerBridge

import fra

Register = Callable[..., None]


@pytest.fixture
def registered() -> Iterator[Register]:
    """Registers an architecture, for TransformerBridge unless another class is given, until the test ends."""
    with ExitStack() as stack:

        def register(architecture: Callable[[Any], fra.Architecture], matches: Any = TransformerBridge) -> None:
            stack.callback(fra.register_architecture(matches, architecture))

        yield register
