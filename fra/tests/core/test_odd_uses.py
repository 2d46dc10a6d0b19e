"""Uses that nobody planned: several threads on one model, results that go to other processes."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pandas as pd
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, BertConfig

import fra
from fra.core.frozen import freeze
from fra.errors import CannotLoad, FraError
from fra.measures.identities import s01_sentences
from fra.tests.models import build_model, load_model, model_folder, random_tokens, tiny, tiny_sae
from fra.tests.tiny_targets import one_sentence

NORMED = "blocks.1.ln1.hook_normalized"


def test_threads_on_one_model_do_not_see_each_others_passes() -> None:
    """Hooks are the model's: without turns a pass shows itself in another thread's cache."""
    model, sae = tiny("llama"), tiny_sae(NORMED)
    documents = [random_tokens(20, seed) for seed in range(6)]
    truth = [fra.resolve(model, sae, tokens, 1, 2).scores() for tokens in documents]
    together = Barrier(len(documents))

    def again(number: int) -> bool:
        together.wait()
        found = [fra.resolve(model, sae, documents[number], 1, 2).scores() for _ in range(8)]
        return all(torch.equal(scores, truth[number]) for scores in found)

    with ThreadPoolExecutor(len(documents)) as pool:
        assert all(pool.map(again, range(len(documents))))


def test_results_go_to_other_processes() -> None:
    model, sae, tokens = tiny("llama"), tiny_sae(NORMED), random_tokens()
    census = fra.census(model, sae, [tokens], 1)
    sent = pickle.dumps(census)
    assert len(sent) < 1 << 20, "the model is not in it"
    got = pickle.loads(sent)  # noqa: S301 (written a line above)
    pd.testing.assert_frame_equal(got.channels(n=9), census.channels(n=9))
    assert got.fingerprint == census.fingerprint
    head = fra.resolve(model, sae, tokens, 1, 2)
    assert torch.equal(pickle.loads(pickle.dumps(head)).scores(), head.scores())  # noqa: S301


def test_a_model_that_attends_to_what_follows_is_refused_for_that(tmp_path_factory: pytest.TempPathFactory) -> None:
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=32, is_decoder=False)
    model = load_model(build_model("bert", folder, config=config))
    with pytest.raises(FraError, match="attention in both directions") as caught:
        fra.resolve(model, tiny_sae("blocks.1.hook_resid_pre"), random_tokens(), 1, 2)
    one_sentence(caught.value)


def test_a_dictionary_that_keeps_more_than_it_has_is_refused_by_name() -> None:
    sae = copy.deepcopy(tiny_sae(NORMED))
    sae.cfg.k = 1000
    with pytest.raises(FraError, match=r"keeps k = 1000 of 96 features") as caught:
        fra.resolve(tiny("llama"), sae, random_tokens(), 1, 2)
    one_sentence(caught.value)


def test_what_cannot_be_changed_cannot_run_and_is_no_refutation() -> None:
    """The pattern of a Bridge's plain attention does not heed an edit of scores: S01 would refute every head."""
    hf = AutoModelForCausalLM.from_pretrained(model_folder("gpt_neo"), attn_implementation="eager")
    bridge = TransformerBridge.boot_transformers(str(model_folder("gpt_neo")), device="cpu", hf_model=hf).eval()
    tokens = random_tokens()
    frozen = freeze(bridge, tokens[None], 1, "blocks.1.hook_resid_pre")
    with pytest.raises(CannotLoad, match="scores of layer 1 cannot be changed: its points of attention fire"):
        s01_sentences.moved_patterns(bridge, tokens, frozen, torch.zeros(4, 20, 20))
