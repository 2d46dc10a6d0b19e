"""A target is admitted before it is believed: model, dictionaries and text are held against each other on the target's
own text.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra.architectures.known import architecture_of
from fra.architectures.losses import losses
from fra.checkpoints.weights import hash_files, hash_tensors
from fra.core.coded import measure_arm
from fra.core.frozen import check_scores, check_tokens, freeze, read_hooks, unchecked
from fra.dictionaries.codes import codes
from fra.dictionaries.fits import explained_variance, reconstructed
from fra.dictionaries.hooks import attention_input_layer, is_head_output, is_output, output_layer_of
from fra.errors import FraError
from fra.targets.preflight import check_size

if TYPE_CHECKING:
    from fra.dictionaries.crosscoder import Placed
    from fra.targets.file import DictionaryTable
    from fra.targets.target import Target

_DOCUMENTS = 8
_TOKENS = 128
_FEW = 3
"""Documents on which losses are taken and other places are tried."""
_MOVES = 1e-4
"""Of the loss, in nats a token: what zeros at a hook must cost for the model to be read there."""
_FIRST_TOKENS = 8
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
    loss_recovered: float | None = None
    """(zeros - dictionary) / (zeros - clean), of the model's loss with either in the activation's place; None where
    zeros there cost nothing, or where it was not measured.
    """


@dataclass(frozen=True)
class AdmissionReport:
    """What was found when a target was admitted."""

    target: str
    n_layers: int
    n_heads: int
    dictionaries: tuple[Quality, ...]
    crosscoders: Mapping[str, Quality] = field(default_factory=dict)
    """By the names of their folders; what the slot that is this model does at its hook."""
    remarks: tuple[str, ...] = ()
    """What is to be known of the text (`Target.remarks`), and of dictionaries that were accepted although they may not
    fit.
    """


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

    What a dictionary explains at its hook, and of attention's outputs the loss that it recovers, decides over what its
    metadata says: where the fit is poor, where the metadata names no hook, or where it names another processing than
    the target, other hooks, layers and processings are tried on a few hundred tokens (`fra.targets.trial`).

    Raises FraError, in one sentence, where [size] is not the model's, a hook does not exist, a dictionary has another
    width, the tokenizer makes ids that the model has not, a dictionary's L0 is zero or half of its features, it
    explains no more than the mean does (attention inputs; released dictionaries of attention's outputs do that in some
    layers and are useful: these must recover some of the loss), it fits clearly better elsewhere, softmax of the
    scores hook is not the pattern hook, or an accelerator computes other numbers than the CPU (`spot_check`). What
    `load_target` and `target.dictionaries` refuse is refused here too. A dictionary whose table in the target file
    says `accept_mismatch = true` is remarked upon where it would be refused for its fit.
    """
    from fra.targets.trial import judged

    cfg = target.model.cfg
    for what, stated, found in (("n_layers", target.n_layers, cfg.n_layers), ("n_heads", target.n_heads, cfg.n_heads)):
        check_size(target.name, what, stated, found)
    for document in target.documents():
        target.tokens(document.text)  # an id beyond the embedding is refused here, and not after an hour
    texts = sample(target)
    spot_check(target, texts[0])
    few = texts[:_FEW]
    clean = _losses(target, few)
    qualities = []
    for hook in target.dictionaries:
        seen = [see(target, hook, tokens) for tokens in texts]
        quality = _check(quality_of(target, hook, seen))
        recovered = loss_recovered(target, hook, few, seen[:_FEW], clean)
        qualities.append(replace(quality, loss_recovered=recovered))
    crosscoders = {
        name: _check(_quality(placed.hook, "crosscoder", placed.crosscoder.d_sae, _through(target, placed, texts)))
        for name, placed in target.crosscoders.items()
    }
    remarks = [*target.remarks(), *judged(target, few, qualities)]
    return AdmissionReport(target.name, target.n_layers, target.n_heads, tuple(qualities), crosscoders, tuple(remarks))


def _through(target: Target, placed: Placed, texts: Sequence[Tensor]) -> list[AtHook]:
    """Documents through the slot of a crosscoder that is this model; `freeze` compares scores, pattern and weights."""
    layer = attention_input_layer(placed.hook)
    arms = [measure_arm(target.model, placed, tokens[None], layer, placed.hook) for tokens in texts]
    return [AtHook(arm.frozen.x[0], arm.codes.error[0], arm.codes.row, arm.codes.feature) for arm in arms]


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
    return _quality(hook, sae.cfg.architecture(), sae.cfg.d_sae, seen)


def _quality(hook: str, architecture: str, d_sae: int, seen: Sequence[AtHook]) -> Quality:
    x = torch.cat([one.x[1:].cpu() for one in seen])
    explained = explained_variance(x, torch.cat([one.error[1:].cpu() for one in seen]))
    live = sum(int((one.row > 0).sum()) for one in seen)
    return Quality(hook, architecture, d_sae, live / len(x), explained, len(x))


def loss_recovered(
    target: Target,
    hook: str,
    texts: Sequence[Int[Tensor, " _pos"]],
    seen: Sequence[AtHook],
    clean: float | None = None,
) -> float | None:
    """(zeros - dictionary) / (zeros - clean), of the loss of every next token with either in the activation's place
    behind the first position; None where zeros there cost nothing.

    clean: the loss of these texts as they are, where it is known.
    """
    loss = {"clean": _losses(target, texts) if clean is None else clean}
    for arm in ("dictionary", "zeros"):
        values = [one.x - one.error if arm == "dictionary" else torch.zeros_like(one.x) for one in seen]
        put = [torch.cat([one.x[:1], value[1:]]) for one, value in zip(seen, values, strict=True)]
        loss[arm] = _losses(target, texts, hook, put)
    costs = loss["zeros"] - loss["clean"]
    n = sum(len(tokens) - 1 for tokens in texts)
    return (loss["zeros"] - loss["dictionary"]) / costs if costs > _MOVES * n else None


@torch.no_grad()
def _losses(
    target: Target, texts: Sequence[Int[Tensor, " _pos"]], hook: str | None = None, put: Sequence[Tensor] = ()
) -> float:
    """Summed loss of these documents, each with its own value in place of a hook's activation where one is named."""
    own = architecture_of(target.model)
    total = 0.0
    for k, tokens in enumerate(texts):

        def edit(activation: Tensor, hook: Any, k: int = k) -> Tensor:
            return put[k].reshape(activation.shape).to(activation)

        edits: list[Any] = [] if hook is None else [(own.point(hook), edit)]
        with warnings.catch_warnings(), target.model.hooks(fwd_hooks=edits):
            warnings.simplefilter(
                "ignore"
            )  # TransformerLens', that an edited norm is computed another way: it is meant
            rows = tokens[None].to(own.device)
            total += float(losses(target.model(rows), rows).double().sum())
    return total


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
    error, row, feature = reconstructed(sae, x, target.n_heads)
    return AtHook(x, error, row, feature)


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
    return quality


def dictionary_notes(target: Target, admitted: AdmissionReport) -> list[dict[str, Any]]:
    """Of every dictionary of the target: hook, where it comes from, role (dictionary, crosscoder, seed or study),
    sha256 of its files (of its tensors, if it is a release's), and what admission found on the target's own text:
    features, L0, explained variance and loss recovered (None of seeds and studies, which no admission measures).
    """
    quality = {("dictionary", found.hook): found for found in admitted.dictionaries}
    quality |= {("crosscoder", name): found for name, found in admitted.crosscoders.items()}
    spec = target.spec
    roles = {"dictionary": spec.saes, "crosscoder": spec.crosscoders, "seed": spec.seed, "study": spec.study}
    said = []
    for role, entries in roles.items():
        for entry in entries:
            named = Path(str(entry.path)).name if role == "crosscoder" else entry.hook
            own = quality.get((role, named))
            said.append(
                {
                    "hook": entry.hook,
                    "role": role,
                    "source": entry.path or f"{entry.release} {entry.sae_id}",
                    "sha256": _hash(target, entry, role),
                    "d_sae": own and own.d_sae,
                    "l0": own and own.l0,
                    "explained_variance": own and own.explained_variance,
                    "loss_recovered": own and own.loss_recovered,
                }
            )
    return said


def _hash(target: Target, entry: DictionaryTable, role: str) -> str | None:
    digest = hashlib.sha256()
    if entry.path is not None:
        hash_files(digest, target.files_of(entry))
    elif role == "dictionary":
        hash_tensors(digest, target.dictionaries[entry.hook].state_dict())
    else:
        return None  # not loaded for this alone
    return digest.hexdigest()


def text_note(target: Target) -> dict[str, Any]:
    """The target's text: where it comes from, its documents and independent sources, sha256 over names, sources and
    texts, and how the first document begins, token by token, BOS with it.
    """
    documents = target.documents()
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.name}\0{document.source}\0{len(document.text)}\0{document.text}".encode())
    start = [] if target.bos is None else [target.bos]
    first = [*start, *target.encode(documents[0].text[:200])][:_FIRST_TOKENS]
    return {
        "documents": target.spec.text.documents,
        "n_documents": len(documents),
        "n_sources": len({document.source for document in documents}),
        "sha256": digest.hexdigest(),
        "first_tokens": [target.tokenizer.decode([token]) for token in first],
    }
