"""Tiny random models and dictionaries, written in the formats and loaded by the ways that a user has."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    LoggingConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    BloomConfig,
    CodeGenConfig,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    OlmoConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3Config,
    SmolLM3Config,
)

from fra.checkpoints.weights import quiet
from fra.core.weights import Model
from fra.targets import models as target_models
from fra.targets.processing import NAMED

D_VOCAB, N_CTX, D_MODEL, D_SAE = 300, 32, 32, 96
WINDOW = 5
NORMS_IN_FLOAT32 = ("llama", "gemma2", "gemma3", "qwen3")
"""Whose RMSNorm in transformers computes in float32, whatever the model's precision."""
ARCHITECTURES = ("gpt2", "llama", "gemma2", "gemma3", "qwen3", "pythia", "gpt_neo", "no_layernorm")
BOS = "<|endoftext|>"


def _config(kind: str) -> Any:
    grouped = {
        "vocab_size": D_VOCAB,
        "hidden_size": D_MODEL,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": N_CTX,
    }
    match kind:
        case "gpt2":
            return GPT2Config(vocab_size=D_VOCAB, n_positions=N_CTX, n_ctx=N_CTX, n_embd=D_MODEL, n_layer=2, n_head=4)
        case "llama":
            return LlamaConfig(**grouped)
        case "gemma2":
            return Gemma2Config(
                **grouped,
                sliding_window=WINDOW,
                attn_logit_softcapping=1.5,
                query_pre_attn_scalar=20,
                layer_types=["full_attention", "sliding_attention"],
            )
        case "gemma3":
            return Gemma3TextConfig(
                **grouped,
                sliding_window=WINDOW,
                query_pre_attn_scalar=20,
                layer_types=["full_attention", "sliding_attention"],
            )
        case "qwen3":
            return Qwen3Config(**grouped)
        case "pythia":
            return GPTNeoXConfig(
                vocab_size=D_VOCAB,
                hidden_size=D_MODEL,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=N_CTX,
                rotary_pct=0.25,
                use_parallel_residual=True,
            )
        case "gpt_neo":
            return GPTNeoConfig(
                vocab_size=D_VOCAB,
                max_position_embeddings=N_CTX,
                hidden_size=D_MODEL,
                num_layers=2,
                num_heads=4,
                attention_types=[[["global", "local"], 1]],
                window_size=WINDOW,
            )
        case "gptj":
            return GPTJConfig(vocab_size=D_VOCAB, n_positions=N_CTX, n_embd=D_MODEL, n_layer=2, n_head=4, rotary_dim=4)
        case "opt":
            sizes = {"hidden_size": D_MODEL, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
            ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
            return OPTConfig(
                vocab_size=D_VOCAB, max_position_embeddings=N_CTX, **sizes, **ids, word_embed_proj_dim=D_MODEL
            )
        case "smollm3":
            return SmolLM3Config(**grouped, no_rope_layers=[1, 0], pad_token_id=0)
        case "qwen2_moe":
            sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
            return Qwen2MoeConfig(**{**grouped, **sizes}, num_experts=4, num_experts_per_tok=2)
        case "codegen":
            return CodeGenConfig(
                vocab_size=D_VOCAB, n_positions=N_CTX, n_ctx=N_CTX, n_embd=D_MODEL, n_layer=2, n_head=4, rotary_dim=4
            )
        case "olmo":
            return OlmoConfig(**{name: size for name, size in grouped.items() if name != "head_dim"}, pad_token_id=1)
        case "longrope":  # other angles in texts of more than 16 tokens
            rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 2.0}
            rope = {**rope, "original_max_position_embeddings": N_CTX // 2, "rope_theta": 10000.0}
            return LlamaConfig(**grouped, rope_parameters=rope)
        case "cohere":
            return CohereConfig(**grouped)
        case "cohere2":
            return Cohere2Config(**grouped)
        case "hunyuan":
            return HunYuanDenseV1Config(**grouped)
        case "bitnet":
            return BitNetConfig(**{name: size for name, size in grouped.items() if name != "head_dim"})
        case "unscaled_gpt2":
            sizes = {"vocab_size": D_VOCAB, "n_positions": N_CTX, "n_embd": D_MODEL, "n_layer": 2, "n_head": 4}
            return GPT2Config(**sizes, scale_attn_weights=False)
        case "bloom":
            return BloomConfig(vocab_size=D_VOCAB, hidden_size=D_MODEL, n_layer=2, n_head=4)
    raise KeyError(kind)


def build_model(kind: str, folder: Path, seed: int = 0, config: Any = None) -> Path:
    """A two-layer random model of `kind` (or of a `config` of transformers) with its tokenizer; norm weights and
    biases are away from ones and zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "no_layernorm":
        own = {
            "n_layers": 2,
            "d_model": D_MODEL,
            "d_head": 8,
            "n_heads": 4,
            "n_ctx": N_CTX,
            "d_vocab": D_VOCAB,
            "attn_only": True,
            "normalization_type": None,
            "init_weights": False,
        }
        model: Any = _Parameters(own)
    else:
        hf = _config(kind) if config is None else config
        model = AutoModelForCausalLM.from_config(hf)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("ln", "norm")) and parameter.ndim == 1 and "bias" not in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                width = (
                    0.4
                    if parameter.ndim == 1 or "emb" in name.lower() or "wte" in name or "wpe" in name
                    else D_MODEL**-0.5
                )
                parameter.copy_(width * torch.randn(parameter.shape, generator=generator))
    if kind == "no_layernorm":
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(own))
        save_file(
            {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()},
            folder / "model.safetensors",
        )
    else:
        model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


class _Parameters(torch.nn.Module):
    """The parameters of a HookedTransformer of attention alone, by its names and in its order, whichever version of
    TransformerLens is there.
    """

    def __init__(self, own: Mapping[str, Any]) -> None:
        super().__init__()
        n, d, e, vocab = (own[key] for key in ("n_heads", "d_model", "d_head", "d_vocab"))
        shapes: dict[str, tuple[int, ...]] = {"embed.W_E": (vocab, d), "pos_embed.W_pos": (own["n_ctx"], d)}
        attention = {"W_Q": (n, d, e), "W_O": (n, e, d), "b_Q": (n, e), "b_O": (d,)}
        attention |= {"W_K": (n, d, e), "W_V": (n, d, e), "b_K": (n, e), "b_V": (n, e)}
        for layer in range(own["n_layers"]):
            shapes |= {f"blocks.{layer}.attn.{name}": shape for name, shape in attention.items()}
        for name, shape in (shapes | {"unembed.W_U": (d, vocab), "unembed.b_U": (vocab,)}).items():
            self.register_parameter(name.replace(".", "/"), torch.nn.Parameter(torch.zeros(shape)))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """By HookedTransformer's names, which a module's own may not be."""
        return ((name.replace("/", "."), value) for name, value in super().named_parameters(*args, **kwargs))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on counting."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=D_VOCAB,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = ("one", "two", "three", "four", "five", "six", "seven")
    tokenizer.train_from_iterator(
        [f"{a} and {b} make more than {a}, said {c}." for a in words for b in words for c in words], trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS)


def load_model(folder: Path, dtype: torch.dtype = torch.float32, folded: bool = False) -> Model:
    """The way a user loads it."""
    return target_models.load_model(folder, dtype=dtype, processing=NAMED["folded" if folded else "none"])


@cache
def folder() -> Path:
    """One place for the models of this process, removed at its end."""
    place = tempfile.TemporaryDirectory()
    _KEPT.append(place)
    return Path(place.name)


_KEPT: list[Any] = []


@cache
def model_folder(kind: str) -> Path:
    """Built once."""
    return build_model(kind, folder() / kind)


@cache
def tiny(kind: str, dtype: torch.dtype = torch.float32, folded: bool = False) -> Model:
    """Built and loaded once. Do not change it."""
    return load_model(model_folder(kind), dtype, folded)


@cache
def tiny_sae(hook_name: str, kind: str = "topk", **options: Any) -> Any:
    """Built, saved and loaded once. Do not change it."""
    name = "-".join([kind, hook_name, *(f"{key}={value}" for key, value in sorted(options.items()))])
    return SAE.load_from_disk(build_sae(kind, D_MODEL, hook_name, folder() / "saes" / name, **options))


def random_tokens(n: int = 20, seed: int = 0) -> torch.Tensor:
    """BOS and n - 1 random ids."""
    tokens = torch.randint(1, D_VOCAB, (n,), generator=torch.Generator().manual_seed(seed))
    tokens[0] = 0
    return tokens


def build_sae(
    kind: str,
    d_in: int,
    hook_name: str,
    folder: Path,
    *,
    d_sae: int = D_SAE,
    k: int = 6,
    dtype: str = "float32",
    seed: int = 0,
    activations: torch.Tensor | None = None,
    **options: Any,
) -> Path:
    """A SAELens dictionary of `kind` ("topk", "jumprelu", "standard", "gated", "batchtopk"), random but for BatchTopK,
    which SAELens' trainer trains for a few steps on `activations` ([n, d_in]; random where None). `options` go to its
    configuration. Load it with SAE.load_from_disk.
    """
    generator = torch.Generator().manual_seed(seed)
    metadata = SAEMetadata(hook_name=hook_name, model_name="tiny")
    common = {"d_in": d_in, "d_sae": d_sae, "dtype": dtype, "metadata": metadata, **options}
    if kind == "batchtopk":
        return _train_batchtopk(
            common, k, folder, torch.randn(256, d_in, generator=generator) if activations is None else activations
        )
    sae: SAE[Any]
    match kind:
        case "topk":
            sae = TopKSAE(TopKSAEConfig(k=k, **common))
        case "jumprelu":
            sae = JumpReLUSAE(JumpReLUSAEConfig(**common))
        case "standard":
            sae = StandardSAE(StandardSAEConfig(**common))
        case "gated":
            sae = GatedSAE(GatedSAEConfig(**common))
        case _:
            raise KeyError(kind)
    with torch.no_grad():
        for name, parameter in sorted(sae.named_parameters()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            if name == "threshold":
                parameter.fill_(1.2)
            elif name in ("b_enc", "b_gate", "b_mag") and kind in ("standard", "gated"):
                parameter.sub_(1.2)
    sae.save_model(folder)
    return folder


def _train_batchtopk(common: dict[str, Any], k: int, folder: Path, activations: torch.Tensor) -> Path:
    batch, steps = 32, 6
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=k, **common))
        cfg = SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            total_training_samples=batch * steps,
            device="cpu",
            autocast=False,
            lr=1e-2,
            lr_end=1e-2,
            lr_scheduler_name="constant",
            lr_warm_up_steps=0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            lr_decay_steps=0,
            n_restart_cycles=1,
            train_batch_size_samples=batch,
            dead_feature_window=1000,
            feature_sampling_window=2000,
            logger=LoggingConfig(log_to_wandb=False),
            n_batches_for_norm_estimate=2,
        )
        data = activations[torch.randint(len(activations), (steps + 4, batch))].to(getattr(torch, common["dtype"]))
        with quiet():
            SAETrainer(sae=sae, cfg=cfg, data_provider=iter(data)).fit()
    sae.save_inference_model(folder)
    return folder
