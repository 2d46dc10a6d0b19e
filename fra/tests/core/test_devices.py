"""The same numbers on every device: the CPU, and CUDA where there is one. FRA_TEST_CUDA=1 says that there must be."""

from __future__ import annotations

import os

import pytest
import torch

import fra

TEXT = "The old captain saw a white bird over the harbour. The old captain saw a white bird"


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        if os.environ.get("FRA_TEST_CUDA") == "1":
            pytest.fail("FRA_TEST_CUDA=1 and torch finds no CUDA device")
        pytest.skip("no CUDA device")
    return str(request.param)


def test_scores_channels_and_removal_are_the_models_own_on_a_device(device: str) -> None:
    target = fra.load_target("mini", device=device)
    _, sae = target.dictionary_for(1)
    tokens = target.tokens(TEXT)
    m = fra.resolve(target.model, sae, tokens, head="L1H4")
    assert m.scores().device.type == device
    hook = "blocks.1.attn.hook_attn_scores"
    _, cache = target.model.run_with_cache(tokens[None].to(device), names_filter=[hook])
    seen = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    own = cache[hook][0, 4].cpu()
    torch.testing.assert_close(m.scores().cpu()[seen], own[seen], rtol=0, atol=1e-3)
    strongest = m.channels(n=5)
    counted = fra.census(target.model, sae, [tokens.to(device)], layer=1, heads=[4]).channels(n=5)
    assert counted[["q_feature", "k_feature"]].equals(strongest[["q_feature", "k_feature"]])
    with fra.remove(target.model, strongest, layer=1, head=4, dictionary=sae):
        _, cache = target.model.run_with_cache(tokens[None].to(device), names_filter=[hook])
    taken = sum(m.channel(int(row.q_feature), int(row.k_feature)).cpu() for row in strongest.itertuples())
    torch.testing.assert_close((own - cache[hook][0, 4].cpu())[seen], taken[seen], rtol=0, atol=1e-3)
