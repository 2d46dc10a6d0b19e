"""Loading a language model as the class whose hooks show what their names say."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from fra.architectures.face import set_aside
from fra.architectures.known import architecture_of
from fra.checkpoints.hub import TRANSFORMER_LENS_AUTHORS
from fra.checkpoints.lens import (
    HookedTransformer,
    HookedTransformerConfig,
    has_hooked,
    load_native,
    loading_from_pretrained,
    model_names,
)
from fra.checkpoints.weights import LIBRARY_ERRORS, check_model, first_line, quiet
from fra.core.weights import Model
from fra.dictionaries.hooks import LayerHooks
from fra.errors import FraError
from fra.targets.processing import FLAGS

DeviceMap = str | dict[str, str | int]
_ONE_DEVICE = (
    "{} is loaded as a HookedTransformer, which is on one device: leave device_map out of its target file, and say the "
    "device where it is measured."
)
_TRIED = 16
"""Tokens on which a loaded model is held against the checkpoint's own model in transformers."""
_APART = 1e-2
"""Of log-probabilities, in nats; those of the same function are 1e-5 apart in single precision, others 0.3 and more."""
_APART_IN_HALF = 0.25
_APART_IN_HALF_FOLDED = 1.0
"""Of weights that processing has rounded a second time."""


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    processing: Collection[str] = (),
    revision: str | None = None,
    device_map: DeviceMap | None = None,
) -> Model:
    """A model from a local directory, or by its name one that TransformerLens keeps in its own format.

    TransformerBridge, except where its hook_attn_scores does not show scores (GPT-Neo, GPT-J, OPT): there
    HookedTransformer. Under TransformerLens 4, which has none, and where it cannot load the model, TransformerBridge
    there, too: heads are resolved, and what changes scores is refused.

    A local directory is either in Hugging Face format, or in TransformerLens' own: config.json with the fields of
    HookedTransformerConfig, model.safetensors with HookedTransformer's parameter names, and tokenizer files; the latter
    is how models without LayerNorm are kept. Local weights are safetensors only.

    processing: the flags of TransformerLens' weight processing that are on (fra.targets.processing.FLAGS); none by
    default. device_map: how a model that does not fit one device is laid over several, in place of `device`, as
    transformers takes it; TransformerBridge alone can.

    Raises FraError for a directory without configuration or weights, weights that are pickled, truncated, incomplete,
    of other shapes or not finite, an unknown processing, a layout that cannot be followed, and a model whose
    log-probabilities are not those that its checkpoint gives in transformers, be it by TransformerLens or by the
    processing.
    """
    unknown = sorted(set(processing) - set(FLAGS))
    if unknown:
        raise FraError(f"unknown weight processing {unknown[0]!r}: the flags are {', '.join(FLAGS)}.")
    flags = {flag: flag in processing for flag in FLAGS}
    folder = Path(path)
    if not folder.is_dir():
        if device_map is not None:
            raise FraError(_ONE_DEVICE.format(f"the model {str(path)!r}"))
        with quiet(), set_aside(), torch.random.fork_rng(devices=[]):
            model: Model = _load_named(str(path), device, dtype, flags, revision)
    else:
        config = check_model(folder, f"the model in {folder}")
        try:
            with quiet(), set_aside(), torch.random.fork_rng(devices=[]):
                if "model_type" in config:
                    model = _load_hugging_face(folder, device, dtype, flags, device_map)
                elif device_map is not None:
                    raise FraError(_ONE_DEVICE.format(f"the model in {folder}"))
                else:
                    model = _load_transformer_lens(folder, config, device, dtype, flags)
        except FraError:
            raise
        except (*LIBRARY_ERRORS, AssertionError, ImportError) as error:
            kind = _kind(folder)
            raise FraError(
                f"the model in {folder} ({kind}) cannot be loaded by TransformerLens in {str(dtype)[6:]} "
                f"({type(error).__name__}: {first_line(error)}): use another model, or another version of it."
            ) from error
    model.eval()
    return model


@torch.no_grad()
def shows_scores(model: Model) -> bool:
    """Whether softmax(hook_attn_scores) is hook_pattern in every layer, tried on four tokens."""
    names = [
        hook
        for layer in range(model.cfg.n_layers)
        for hook in (LayerHooks(layer).attn_scores, LayerHooks(layer).pattern)
    ]
    tokens = torch.arange(4, device=next(model.parameters()).device)[None]
    _, cache = model.run_with_cache(tokens, names_filter=names)
    for scores, pattern in zip(names[::2], names[1::2], strict=True):
        if scores not in cache or pattern not in cache:
            return False
        if float((cache[scores].float().softmax(-1) - cache[pattern].float()).abs().max()) > 1e-2:
            return False
    return True


def _processed(bridge: TransformerBridge, flags: dict[str, bool]) -> TransformerBridge:
    if any(flags.values()):
        bridge.enable_compatibility_mode(disable_warnings=True, **flags)
    return bridge


def _load_named(
    name: str, device: str | torch.device, dtype: torch.dtype, flags: dict[str, bool], revision: str | None
) -> Model:
    official = model_names().get(name.lower(), name)
    if not official.startswith(TRANSFORMER_LENS_AUTHORS):
        raise FraError(f"there is no directory {name}: give one with config.json and model.safetensors.")
    if not has_hooked():
        if revision is not None:
            raise FraError(
                f"TransformerLens 4 takes no revision of {name!r}: leave it out, or install transformer-lens<4."
            )
        four: Any = TransformerBridge  # in its own format only since version 4
        return _processed(four.boot_tl_legacy(official, device=device, dtype=dtype), flags)
    options: dict[str, Any] = flags if revision is None else {**flags, "revision": revision}
    return HookedTransformer.from_pretrained(official, device=str(device), dtype=dtype, **options)


def _load_hugging_face(
    folder: Path,
    device: str | torch.device,
    dtype: torch.dtype,
    flags: dict[str, bool],
    device_map: DeviceMap | None,
) -> Model:
    def weights() -> Any:
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation="eager",
                local_files_only=True,
                output_loading_info=True,
                **({} if device_map is None else {"device_map": device_map}),
            )
        except (RuntimeError, ValueError, AssertionError) as error:
            if device_map is not None:
                raise FraError(
                    f"the model in {folder} cannot be laid out as device_map says ({first_line(error)}): name modules "
                    "that it has, and devices that are here."
                ) from error
            raise FraError(f"the weights in {folder} do not fit its config.json ({first_line(error)}).") from error
        hf, info = loaded
        # transformers would fill them with random numbers, and go on.
        if info["missing_keys"]:
            raise FraError(f"the weights in {folder} lack {sorted(info['missing_keys'])[0]!r}: the file is incomplete.")
        return hf if device_map is not None else hf.to(device)

    hf = weights()
    home = hf.get_input_embeddings().weight.device
    tokens = _trial_tokens(hf.config, home)
    truth = _log_probs(hf, tokens)  # before the Bridge takes the model apart
    placed = None if device_map is not None else device  # else it says where accelerate has put everything
    bridge = TransformerBridge.boot_transformers(str(folder), device=placed, dtype=dtype, hf_model=hf)
    if not shows_scores(bridge) and has_hooked():
        if device_map is not None:
            raise FraError(_ONE_DEVICE.format(f"the model in {folder}"))
        try:
            hooked = load_hooked(folder, weights(), device, dtype, flags)
            _check_function(hooked, tokens, truth, folder, flags, unprocessed=False)
            return hooked
        except (FraError, *LIBRARY_ERRORS, AssertionError):
            # HookedTransformer guesses some sizes (GPT-J's MLP); the Bridge's heads can be resolved all the same.
            if not any(architecture_of(bridge).fires_afterwards(layer) for layer in range(bridge.cfg.n_layers)):
                raise
    _check_function(bridge, tokens, truth, folder, dict.fromkeys(flags, False))
    if any(flags.values()):
        _check_function(_processed(bridge, flags), tokens, truth, folder, flags)
    return bridge


def _trial_tokens(config: Any, device: str | torch.device) -> Int[Tensor, "1 pos"]:
    """Some ids from all over the vocabulary, none of them special: no library takes one for padding."""
    text = config.get_text_config()
    special = {getattr(text, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    n_pos = min(_TRIED, getattr(text, "max_position_embeddings", None) or _TRIED)
    step = max(1, text.vocab_size // (2 * n_pos))
    ids = [token for token in range(step // 2, text.vocab_size, step) if token not in special]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:n_pos]
    return torch.tensor(ids, device=device)[order.to(device)][None]


@torch.no_grad()
def _log_probs(model: Any, tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, "pos d_vocab"]:
    """Of a model of transformers or of TransformerLens."""
    model.eval()
    out = model(tokens)
    logits: Tensor = getattr(out, "logits", out)[0].cpu()  # of several devices, the last one's
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def _check_function(
    model: Model,
    tokens: Int[Tensor, "1 pos"],
    truth: Float[Tensor, "pos d_vocab"],
    folder: Path,
    flags: dict[str, bool],
    *,
    unprocessed: bool = True,
) -> None:
    """Raises FraError where a loaded model does not give the log-probabilities that the checkpoint gives in
    transformers. unprocessed: whether the model without weight processing is known to give them.
    """
    found = _log_probs(model, tokens)
    width = min(found.shape[-1], truth.shape[-1])
    apart = float((found[:, :width] - truth[:, :width]).abs().max())
    on = [flag for flag, is_on in flags.items() if is_on]
    half = next(model.parameters()).dtype not in (torch.float32, torch.float64)
    if apart <= (_APART if not half else _APART_IN_HALF_FOLDED if on else _APART_IN_HALF):
        return
    if on and unprocessed:
        raise FraError(
            f"weight processing ({', '.join(on)}) changes the function of the model in {folder}: its log-probabilities "
            f'are off by {apart:.2g} from the checkpoint\'s; set processing = "none", and use dictionaries of that.'
        )
    raise FraError(
        f"the model in {folder} is not the checkpoint's as {type(model).__name__} of TransformerLens computes it: "
        f"log-probabilities are off by {apart:.2g} from those of transformers ({_kind(folder)}); what it shows would "
        "be true of another model: use another model, or another version of TransformerLens."
    )


def _kind(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_bytes())
    return ", ".join(config.get("architectures") or [str(config.get("model_type"))])


def load_hooked(
    folder: Path, hf: Any, device: str | torch.device, dtype: torch.dtype, flags: dict[str, bool]
) -> HookedTransformer:
    """HookedTransformer with the weights of `hf`, the Hugging Face model in `folder`.

    Its configuration says where it goes (`device`). HookedTransformer.from_pretrained refuses paths; the functions
    beneath it take them. They guess the architecture from words in the path ("llama", "gemma", "bert"), so they are
    shown one without words.
    """
    with tempfile.TemporaryDirectory() as neutral:
        Path(neutral, "config.json").write_bytes((folder / "config.json").read_bytes())
        cfg = loading_from_pretrained.get_pretrained_model_config(
            neutral, fold_ln=flags["fold_ln"], device=str(device), dtype=dtype
        )
        state = loading_from_pretrained.get_pretrained_state_dict(neutral, cfg, hf_model=hf, dtype=dtype)
    model = HookedTransformer(cfg, AutoTokenizer.from_pretrained(folder))
    model.load_and_process_state_dict(state, **flags)
    return model


def _load_transformer_lens(
    folder: Path, config: dict[str, Any], device: str | torch.device, dtype: torch.dtype, flags: dict[str, bool]
) -> Model:
    state = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not has_hooked():
        native = load_native(config, state, tokenizer, device, dtype)
        tokens = torch.arange(min(_TRIED, native.cfg.n_ctx, native.cfg.d_vocab), device=device)[None]
        truth = _log_probs(native, tokens)
        if any(flags.values()):
            _check_function(_processed(native, flags), tokens, truth, folder, flags)
        return native
    try:
        cfg = HookedTransformerConfig.from_dict({**config, "device": str(device), "dtype": dtype})
    except TypeError as error:
        raise FraError(
            f"{folder / 'config.json'} has no model_type, and is no TransformerLens configuration either ({error})."
        ) from error
    model = HookedTransformer(cfg, tokenizer)
    # load_and_process_state_dict leaves what it is not given as it was made: at random.
    for name, parameter in model.named_parameters():
        if name not in state:
            raise FraError(f"the weights in {folder} lack {name!r}: the file is incomplete.")
        if state[name].shape != parameter.shape:
            raise FraError(
                f"the weights in {folder} do not fit its config.json: {name!r} has "
                f"shape {tuple(state[name].shape)}, not {tuple(parameter.shape)}."
            )
    model.load_and_process_state_dict(state, **flags)
    return model
