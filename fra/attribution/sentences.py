"""How heads attend to sentences: receiver heads, continuations, and what a sentence is worth to an answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.stats import kurtosis
from torch import Tensor

from fra.architectures.architecture import Model
from fra.architectures.face import face
from fra.architectures.known import architecture_of
from fra.attribution.designs import Receivers
from fra.core.frozen import read_hooks
from fra.core.sentences import Segments, sentence_starts
from fra.dictionaries.hooks import LayerHooks
from fra.errors import FraError


@face
@torch.no_grad()
def attention_between(model: Model, segments: Segments) -> Float[np.ndarray, "n_layers n_heads n_segments n_segments"]:
    """Mean attention of the tokens of one segment (rows) to a token of another (columns), of every head: by token means
    on both sides, so that long sentences are no larger.
    """
    return between(patterns_of(model, segments.tokens), segments)


@torch.no_grad()
def patterns_of(model: Model, tokens: Int[Tensor, " pos"]) -> Float[Tensor, "n_layers n_heads pos pos"]:
    """Every head's pattern on a document, in double precision."""
    n = architecture_of(model).n_layers
    names = {str(layer): LayerHooks(layer).pattern for layer in range(n)}
    seen = read_hooks(model, tokens[None], n - 1, names)
    return torch.stack([seen[str(layer)][0].double().cpu() for layer in range(n)])


def between(
    patterns: Float[Tensor, "*heads pos pos"], segments: Segments
) -> Float[np.ndarray, "*heads n_segments n_segments"]:
    """As `attention_between`, of patterns that are known."""
    member = torch.nn.functional.one_hot(segments.segment, len(segments)).double()
    mean = member / member.sum(0)
    return np.asarray(mean.T @ patterns @ mean)


def vertical_scores(
    between: Float[np.ndarray, "*heads n_segments n_segments"], segments: Segments, apart: int = Receivers().apart
) -> Float[np.ndarray, "*heads n_receiving"]:
    """Of each sentence the mean attention that sentences at least `apart` on pay it, from `attention_between`; BOS and
    the prompt neither pay nor receive. Only sentences that have one as far on; raises FraError where there is none.
    """
    sentences = [k for k, kind in enumerate(segments.kinds) if kind == "sentence"]
    if apart < 1:
        raise FraError(f"apart={apart}: give at least 1, a sentence pays itself no attention from afar.")
    if len(sentences) <= apart:
        raise FraError(f"the document has {len(sentences)} sentences: attention {apart} sentences on needs more.")
    columns = [between[..., sentences[k + apart :], sentences[k]].mean(-1) for k in range(len(sentences) - apart)]
    return np.stack(columns, axis=-1)


@face
def receiver_heads(model: Model, segments: Segments, apart: int = Receivers().apart) -> pd.DataFrame:
    """Every head's vertical scores on one document: columns head ("L1H4"), kurtosis (Fisher's: 0 of a normal
    distribution, large where a few sentences receive what is paid), sentence (the number of the segment that receives
    most) and received (its score); largest kurtosis first. NaN of a head that pays all the same.
    """
    scores = vertical_scores(attention_between(model, segments), segments, apart)
    sentences = [k for k, kind in enumerate(segments.kinds) if kind == "sentence"]
    rows = [
        (f"L{layer}H{head}", float(kurtosis_of(own)), sentences[int(own.argmax())], float(own.max()))
        for layer, heads in enumerate(scores)
        for head, own in enumerate(heads)
    ]
    table = pd.DataFrame(rows, columns=["head", "kurtosis", "sentence", "received"])
    return table.sort_values("kurtosis", ascending=False, kind="stable", ignore_index=True)


def kurtosis_of(scores: Float[np.ndarray, "*heads n"]) -> Float[np.ndarray, "*heads"]:
    """Fisher's, over sentences; NaN where all scores are the same."""
    same = np.ptp(scores, axis=-1) == 0
    told = np.where(same[..., None], np.arange(scores.shape[-1]), scores)  # scipy warns of what is all the same
    return np.asarray(np.where(same, np.nan, kurtosis(told, axis=-1)))


def continued(tokenizer: Any, segments: Segments, ids: Int[Tensor, " n"]) -> Segments:
    """The document with a continuation that was generated, kept as the ids that it is: its text is found by decoding
    and never tokenized again, for that could give other tokens. Its sentences begin at `sentence_starts` of it.

    Raises FraError for a continuation without ids.
    """
    given = [int(one) for one in ids]
    if not given:
        raise FraError("the continuation has no ids: give at least one.")
    # Bytes of one character may stand in several tokens: what is decoded so far then ends in a stand-in for them.
    so_far = [tokenizer.decode(given[: k + 1]) for k in range(len(given))]
    text = so_far[-1]
    ends = np.maximum.accumulate([min(len(one.rstrip("\ufffd")), len(text)) for one in so_far])
    begins = [0, *ends[:-1].tolist()]
    first = [low + _blank(text[low:high]) for low, high in zip(begins, ends.tolist(), strict=True)]
    starts = sentence_starts(text)
    place = np.maximum.accumulate(np.searchsorted(starts, first, side="right") - 1)
    used, number = np.unique(place, return_inverse=True)
    bounds = [*starts[1:], len(text)]
    spans = tuple(text[starts[k] : bounds[k]] for k in used.tolist())
    return Segments(
        torch.cat([segments.tokens, torch.tensor(given, dtype=segments.tokens.dtype)]),
        torch.cat([segments.segment, torch.from_numpy(number) + len(segments)]),
        (*segments.kinds, *("sentence" for _ in spans)),
        (*segments.texts, *spans),
    )


def _blank(text: str) -> int:
    """White space at the beginning; up to the last character where all is."""
    return min(len(text) - len(text.lstrip()), max(len(text) - 1, 0))


@face
@torch.no_grad()
def resample(
    model: Model, tokens: Int[Tensor, " pos"], n: int, length: int, *, seed: int, temperature: float = 1.0
) -> Int[Tensor, "n length"]:
    """n continuations of a document, `length` ids each, drawn by the model itself; the same for the same seed. The
    whole document is run again for every id: for small models. Raises FraError where the model's context does not hold
    them.
    """
    if n < 1 or length < 1 or not temperature > 0:
        raise FraError("give a positive number of continuations, of ids, and a positive temperature.")
    n_ctx = architecture_of(model).n_ctx
    if len(tokens) + length > n_ctx:
        raise FraError(f"{len(tokens)} tokens and {length} more are beyond the model's context of {n_ctx}.")
    generator = torch.Generator().manual_seed(seed)
    device = architecture_of(model).device
    whole = tokens.to(device).expand(n, -1)
    for _ in range(length):
        logits = model(whole)[:, -1].double().cpu() / temperature
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        whole = torch.cat([whole, drawn.to(whole)], dim=1)
    return whole[:, len(tokens) :].cpu()


@torch.no_grad()
def answer_log_prob(model: Model, tokens: Int[Tensor, " pos"], answer: Int[Tensor, " n"]) -> float:
    """log-probability of the ids of `answer` after the document, in nats."""
    device = architecture_of(model).device
    whole = torch.cat([tokens, answer.to(tokens)]).to(device)
    log_probs = model(whole[None])[0, len(tokens) - 1 : -1].double().log_softmax(-1)
    return float(log_probs.gather(1, whole[len(tokens) :, None]).sum())
