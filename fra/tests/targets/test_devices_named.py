"""Devices that are named and cannot be measured on."""

from __future__ import annotations

import pytest
import torch

from fixtures import devices
from fra.errors import FraError


@pytest.mark.parametrize("version", ["2.8.1", "2.10.0+cpu"])
def test_torch_that_is_wrong_on_mps_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "__version__", version)
    if version.startswith("2.8"):
        with pytest.raises(FraError, match=r"torch 2\.8\.1 makes wrong numbers on MPS"):
            devices.resolve_device("mps")
    else:
        assert devices.resolve_device("mps") == "mps"
