"""A target is admitted before it is believed: model, dictionaries and text are held against each other on the target's
own text.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.architectures.known import architecture_of
from fra.core.frozen import check_scores, check_tokens, freeze, read_hooks, unchecked
from fra.dictionaries.codes import codes
from fra.dictionaries.hooks import attention_input_layer, is_head_output, is_output, output_layer_of
from fra.errors import FraError
from fra.targets.preflight import check_size

if TYPE_CHECKING:
    from fra.targets.target import Target

_DOCUMENTS = 8
_TOKENS = 128
_SPOT_TOKENS = 64
_SPOT_APART = 1e-3
"""Of a reconstruction, by its length: single precision on two devices is 1e-5 apart."""
_DENSEST = 0.5
"""A dictionary with a larger share of its features live at a position is not sparse; an untrained ReLU has half."""


@dataclass(frozen=True)
class Quality:
    """What a dictionary does on the target's own text, the first position of each document left out."""

    hook: str
    architecture: str
    d_sae: int
    l0: float
    """Features live at a position, on average."""
    explained_variance: float
    """1 - (squared error) / (squared deviation from the mean), summed over positions and dimensions."""
    positions: int


@dataclass(frozen=True)
class AdmissionReport:
    """What was found when a target was admitted."""

    target: str
    n_layers: int
    n_heads: int
    dictionaries: tuple[Quality, ...]
    remarks: tuple[str, ...] = ()
    """What is to be known of the text (`Target.remarks`)."""


def sample(target: Target, n_documents: int = _DOCUMENTS, n_tokens: int = _TOKENS) -> list[Int[Tensor, " _pos"]]:
    """The beginnings of the target's first documents, with BOS where the target prepends it, cut to the model's
    context.

    Raises FraError where a document has no more than one token.
    """
    start = int(target.bos is not None)
    found = []
    for document in target.documents()[:n_documents]:
        tokens = target.tokens(document.text, n_tokens)
        if len(tokens) <= start + 1:
            raise FraError(
                f"the document {document.name!r} of {target.name!r} has {len(tokens) - start} tokens: write more text "
                "into it."
            )
        check_tokens(target.model, tokens[None])
        found.append(tokens)
    return found


@torch.no_grad()
def admit(target: Target) -> AdmissionReport:
    """Loads the target and checks it on its own text.

    Raises FraError, in one sentence, where [size] is not the model's, a hook does not exist, a dictionary has another
    width, the tokenizer makes ids that the model has not, a dictionary's L0 is zero or half of its features, it
    explains no more than the mean does (attention inputs; released dictionaries of attention's outputs do that in some
    layers and are useful), softmax of the scores hook is not the pattern hook, or an accelerator computes other numbers
    than the CPU (`spot_check`). What `load_target` and
    `target.dictionaries` refuse is refused here too.
    """
    cfg = target.model.cfg
    for what, stated, found in (("n_layers", target.n_layers, cfg.n_layers), ("n_heads", target.n_heads, cfg.n_heads)):
        check_size(target.name, what, stated, found)
    for document in target.documents():
        target.tokens(document.text)  # an id beyond the embedding is refused here, and not after an hour
    texts = sample(target)
    spot_check(target, texts[0])
    qualities = tuple(
        _check(quality_of(target, hook, [see(target, hook, tokens) for tokens in texts]))
        for hook in target.dictionaries
    )
    return AdmissionReport(target.name, target.n_layers, target.n_heads, qualities, tuple(target.remarks()))


@torch.no_grad()
def spot_check(target: Target, tokens: Int[Tensor, " pos"]) -> None:
    """Holds what an accelerator computes against the CPU, at every dictionary of an attention input on one document:
    the model's attention scores against those that the CPU makes of the same inputs and weights in float64, and the
    dictionary's reconstruction against the CPU's. Some accelerators are wrong without a word. Nothing on a CPU. Raises
    FraError.
    """
    for hook in target.dictionaries:
        if is_output(hook) or (layer := attention_input_layer(hook)) >= target.n_layers:
            continue
        frozen, _ = unchecked(target.model, tokens[None, :_SPOT_TOKENS], layer, hook)
        if (device := frozen.x.device).type == "cpu":
            return
        wrong = FraError(
            f"{device} computes other numbers than the CPU at layer {layer} of {target.name!r} (torch "
            f"{torch.__version__}): measure with --device cpu; where that admits the target, another version of torch "
            "or of the driver may be right."
        )
        try:
            check_scores(frozen.on_cpu(), architecture_of(target.model))
        except FraError as error:
            raise wrong from error
        there = target.dictionaries[hook]
        here = deepcopy(there).to("cpu")
        x = frozen.x[0].to(there.W_dec.dtype)
        found, truth = there.decode(there.encode(x)).cpu(), here.decode(here.encode(x.cpu()))
        # The middle of the positions: where two features are all but tied, either may be live.
        apart = ((found - truth).norm(dim=-1) / truth.norm(dim=-1).clamp(min=1e-30)).median()
        if not float(apart) <= _SPOT_APART:
            raise wrong


@dataclass(frozen=True)
class AtHook:
    """One document at a dictionary's hook: the activation, what the dictionary leaves of it, and what is live."""

    x: Float[Tensor, "pos d_in"]
    error: Float[Tensor, "pos d_in"]
    row: Int[Tensor, " n"]
    """Position of each live entry."""
    feature: Int[Tensor, " n"]


def see(target: Target, hook: str, tokens: Int[Tensor, " pos"]) -> AtHook:
    """A document at a dictionary's hook. Raises FraError where hook, dictionary and model do not fit one another; of an
    attention input also where scores, pattern and weights do not.
    """
    return (_output if is_output(hook) else _attention_input)(target, hook, target.dictionaries[hook], tokens)


def quality_of(target: Target, hook: str, seen: Sequence[AtHook]) -> Quality:
    """What the dictionary does on these documents, the first position of each left out: it is an attention sink of
    outlying norm in most models.
    """
    sae = target.dictionaries[hook]
    x = torch.cat([one.x[1:].cpu() for one in seen]).double()
    error = torch.cat([one.error[1:].cpu() for one in seen]).double()
    live = sum(int((one.row > 0).sum()) for one in seen)
    spread = float((x - x.mean(0)).square().sum())
    explained = 1 - float(error.square().sum()) / spread if spread > 0 else float("nan")
    return Quality(hook, sae.cfg.architecture(), sae.cfg.d_sae, live / len(x), explained, len(x))


def _attention_input(target: Target, hook: str, sae: Any, tokens: Int[Tensor, " pos"]) -> AtHook:
    """`freeze` compares scores, pattern and weights."""
    layer = attention_input_layer(hook)
    if layer >= target.n_layers:
        raise FraError(
            f"{hook!r} feeds no attention layer: {target.name!r} has {target.n_layers} layers; use another hook."
        )
    frozen = freeze(target.model, tokens[None], layer, hook)
    found = codes(sae, frozen.x)
    return AtHook(frozen.x[0], found.error[0], found.row, found.feature)


def _output(target: Target, hook: str, sae: Any, tokens: Int[Tensor, " pos"]) -> AtHook:
    """All heads concatenated, or what attention writes."""
    model = target.model
    if hook not in model.hook_dict:
        raise FraError(f"the model of {target.name!r} has no hook {hook!r}: use a dictionary at a hook that it has.")
    layer = output_layer_of(hook)
    assert layer is not None
    x = read_hooks(model, tokens[None], layer, {"x": hook})["x"][0].flatten(1).to(sae.W_dec)
    if sae.cfg.d_in != x.shape[1]:
        what = f"head outputs there have {x.shape[1]} ({target.n_heads} heads)"
        if not is_head_output(hook):
            what = f"attention outputs there have {x.shape[1]}"
        raise FraError(
            f"the dictionary at {hook!r} has width {sae.cfg.d_in} and the {what}: it belongs to another model."
        )
    parts = x.view(len(x), target.n_heads if is_head_output(hook) else 1, -1)
    acts = sae.encode(parts if sae.cfg.reshape_activations == "hook_z" else x)
    row, feature = torch.nonzero(acts, as_tuple=True)
    return AtHook(x, x - sae.decode(acts).reshape(x.shape), row, feature)


def _check(quality: Quality) -> Quality:
    what = f"the dictionary at {quality.hook!r}"
    text = f"on the target's own text ({quality.positions} positions)"
    if not quality.l0 > 0:
        raise FraError(f"{what} has no live feature {text}: wrong weights, hook or processing.")
    if quality.l0 > _DENSEST * quality.d_sae:
        raise FraError(
            f"{what} has {quality.l0:.0f} of its {quality.d_sae} features live at a position {text}: it is not sparse, "
            "so it is untrained or made for other activations."
        )
    if not is_output(quality.hook) and not quality.explained_variance > 0:
        raise FraError(
            f"{what} explains no more than the mean does {text} (explained variance {quality.explained_variance:.2f}): "
            "it was made for another model, hook or weight processing."
        )
    return quality
