"""Cards of a dictionary's features, and of its channels: `python -m fra.cards TARGET --hook HOOK -o FOLDER`.

Of head outputs one page for each head, with the features whose decoder lies most in that head: when each fires, which
tokens and heads make it fire, what it writes. Of attention inputs the pages of `fra.report.channel_pages`: a channel
("1575 -> 1794") a page, each feature's strongest partners, all features of a head. Either with an index; they load
nothing and open offline. The pages describe; they test nothing. A report beside their folder's parent
(`build/report.html` and `build/cards/HOOK`) links to them, and they to the report that `--report` names.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fra import attribution
from fra.attribution.examples import examples_of
from fra.attribution.head_outputs import Live
from fra.attribution.raised_tokens import direct_logits
from fra.dictionaries.codes import neuronpedia
from fra.dictionaries.encoder import head_output_layer
from fra.dictionaries.hooks import attention_input_layer, is_output
from fra.errors import FraError
from fra.features.firings import by_feature, histogram
from fra.features.query_key import STRONGEST, query_key_cards
from fra.report import channel_pages
from fra.report import labels as label_files
from fra.report.card_links import channels_of
from fra.report.card_pages import Card, CardExample, write_pages
from fra.stimuli.natural import natural_documents
from fra.verdicts import files
from fra.verdicts import ledger as ledgers
from fra.verdicts.shown import print_anything

if TYPE_CHECKING:
    from fra.targets.target import Target

EXAMPLES = 5
"""Examples of a feature, each from a document of its own."""
LOGITS = 8
_CHANNEL = re.compile(r"(\d+) -> (\d+)")
_DOCUMENTS_AT_ONCE = 25
_FEATURES_AT_ONCE = 256


@dataclass(frozen=True)
class Firings:
    """Every firing of the dictionary's features on the documents, without the first position of each."""

    live: Live
    n_positions: int


def firings(target: Target, sae: Any, documents: Sequence[Int[Tensor, " _pos"]]) -> Firings:
    """Runs the documents through model and dictionary, some at a time."""
    parts, positions = [], 0
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        some = documents[start : start + _DOCUMENTS_AT_ONCE]
        live = attribution.observe(target.model, sae, some).live
        live = live.where(live.pos > 0)  # the first position, often a sink, fires like no other
        parts.append(Live(live.doc + start, live.pos, live.feature, live.value))
        positions += sum(len(doc) - 1 for doc in some)
    return Firings(Live(*(torch.cat([getattr(p, f) for p in parts]) for f in _FIELDS)), positions)


_FIELDS = ("doc", "pos", "feature", "value")


def sources_of(
    target: Target, sae: Any, documents: Sequence[Int[Tensor, " _pos"]], at: Live
) -> list[Float[np.ndarray, " k_pos"]]:
    """DFA by source position (all heads together) of chosen firings; causal keys only."""
    found: list[np.ndarray] = [np.zeros(0)] * len(at)
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        here = torch.nonzero((at.doc >= start) & (at.doc < start + _DOCUMENTS_AT_ONCE))[:, 0]
        if not len(here):
            continue
        observed = attribution.observe(target.model, sae, documents[start : start + _DOCUMENTS_AT_ONCE])
        some = Live(at.doc[here] - start, at.pos[here], at.feature[here], at.value[here])
        rows = observed.sources(some).cpu().numpy()
        for number, row, pos in zip(here.tolist(), rows, some.pos.tolist(), strict=True):
            found[number] = row[: pos + 1]
    return found


def decoder_shares(sae: Any, n_heads: int) -> Float[Tensor, "d_sae n_heads"]:
    """Share of each head in the norms of a feature's decoder: |d_f,h| / sum_h' |d_f,h'|."""
    norms = sae.W_dec.detach().view(len(sae.W_dec), n_heads, -1).norm(dim=-1)
    share: Tensor = norms / norms.sum(-1, keepdim=True).clamp(min=1e-12)
    return share


def cards(
    target: Target, hook: str, *, n_documents: int | None = None, progress: Callable[[str], None] = lambda _: None
) -> dict[int, list[Card]]:
    """Cards of every feature of the dictionary at `hook` that fires, by the head in which its decoder lies most,
    largest share first.

    Raises FraError for a hook without a dictionary, one that is not of head outputs, and a target without text.
    """
    sae = _dictionary(target, hook)
    head_output_layer(sae)  # refuses any other kind
    n = n_documents or len(target.documents())
    documents = natural_documents(target, n)
    progress(f"{hook}: {n} documents through model and dictionary")
    found = firings(target, sae, documents)
    at = examples_of(found.live, EXAMPLES)
    progress(f"{hook}: sources of {len(at)} examples")
    sources = sources_of(target, sae, documents, at)
    progress(f"{hook}: logits and pages")
    share = decoder_shares(sae, target.n_heads)
    text = {token: str(target.tokenizer.decode([token])) for token in range(int(target.model.cfg.d_vocab))}
    firing = by_feature(found.live)
    examples: dict[int, list[CardExample]] = {}
    for doc, pos, feature, of in zip(at.doc.tolist(), at.pos.tolist(), at.feature.tolist(), sources, strict=True):
        docs, positions, values = firing[feature]
        here = dict(zip(positions[docs == doc].tolist(), values[docs == doc].tolist(), strict=True))
        tokens = [text[int(token)] for token in documents[doc]]
        examples.setdefault(feature, []).append(CardExample(tokens, pos, here, of.tolist()))

    def words(logits: Tensor, ids: Tensor) -> list[tuple[str, float]]:
        return [(text[i], value) for i, value in zip(ids.tolist(), logits.tolist(), strict=True)]

    by_head: dict[int, list[Card]] = {head: [] for head in range(target.n_heads)}
    alive = torch.tensor(sorted(firing), dtype=torch.long, device=sae.W_dec.device)
    for some in torch.split(alive, _FEATURES_AT_ONCE):
        logits = direct_logits(target.model, sae, some)
        top, bottom = logits.topk(LOGITS), logits.topk(LOGITS, largest=False)
        for row, feature in enumerate(some.tolist()):
            docs, _, values = firing[feature]
            counts, edge = histogram(values)
            card = Card(
                feature=feature,
                density=len(values) / found.n_positions,
                documents=len(np.unique(docs)),
                largest=float(values.max()),
                histogram=counts,
                edge=edge,
                share=share[feature].tolist(),
                top=words(top.values[row], top.indices[row]),
                bottom=words(bottom.values[row], bottom.indices[row]),
                examples=examples[feature],
            )
            by_head[int(share[feature].argmax())].append(card)
    return {head: sorted(own, key=partial(_rank, head)) for head, own in by_head.items()}


def _rank(head: int, card: Card) -> tuple[float, int]:
    return -card.share[head], card.feature


def channels_in(ledger: Path, layer: int) -> list[tuple[int, int]]:
    """The channels that a ledger's rows about a layer's heads name, as (query feature, key feature). Raises FraError
    for what is no ledger.
    """
    found: set[tuple[int, int]] = set()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(key)
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)
        elif isinstance(value, str) and (pair := _CHANNEL.fullmatch(value)):
            found.add((int(pair[1]), int(pair[2])))

    for row in ledgers.read(ledger).verdicts:
        if channels_of(row.head, row.detail).startswith(f"L{layer}H"):
            walk(row.detail)
    return sorted(found)


def run(
    target: str,
    hook: str,
    output: Path,
    *,
    report: Path | None = None,
    labels: Path | None = None,
    ledger: Path | None = None,
    strongest: int = STRONGEST,
    documents: int | None = None,
    device: str = "cpu",
    quiet: bool = False,
) -> None:
    """Write the pages of one dictionary of a target and say where they are; progress on stderr unless `quiet`.

    labels: a file of features' names (`fra.report.labels`). Of an attention-input dictionary the `strongest` channels
    of each head get a page, and those that the rows of `ledger` name. Raises FraError as `load_target`, `cards` and
    `query_key_cards` do, for labels and ledgers that are none, and where the folder cannot be written.
    """
    from fra.targets.target import load_target

    began = time.monotonic()

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    if documents is not None and documents < 1:
        raise FraError(f"documents={documents} asks for none: give a positive number, or leave it out.")
    loaded = load_target(target, device=device)
    sae = _dictionary(loaded, hook)
    d_sae, named = len(sae.W_dec), None
    if labels is not None:
        page = neuronpedia(sae)
        named = label_files.read(labels, d_sae, page and page.removeprefix("https://www.neuronpedia.org/"))
    wanted = () if ledger is None or is_output(hook) else channels_in(ledger, attention_input_layer(hook))
    files.check_writable(output / "index.html")
    about: dict[str, Any] = {"fingerprint": loaded.fingerprint(), "report": report}
    if is_output(hook):
        by_head = cards(loaded, hook, n_documents=documents, progress=say)
        layer = head_output_layer(sae)
        written = write_pages(by_head, output, loaded.name, hook, layer, d_sae, labels=named, **about)
        made = f"{sum(map(len, by_head.values()))} features"
    else:
        found = query_key_cards(
            loaded, hook, n_documents=documents, strongest=strongest, named=wanted, labels=named, progress=say
        )
        say(f"{hook}: pages")
        written = channel_pages.write_pages(found, output, **about)
        made = f"{len(found.features)} features, {len(found.channels)} channels"
    say(f"{time.monotonic() - began:.0f} s")
    print(f"wrote {written} pages, {made}: {output / 'index.html'}")


def _dictionary(target: Target, hook: str) -> Any:
    if hook not in target.dictionaries:
        there = ", ".join(target.dictionaries) or "none"
        raise FraError(f"{target.name!r} has no dictionary at {hook!r}; it has {there}.")
    return target.dictionaries[hook]


def main(argv: list[str] | None = None) -> int:
    """Write the pages: 0, or 2 with one sentence on stderr."""
    print_anything()
    parser = argparse.ArgumentParser(
        prog="python -m fra.cards", description="Cards of a dictionary's features, and of its channels."
    )
    parser.add_argument("target", metavar="TARGET", help="a preset or a target file")
    parser.add_argument("--hook", required=True, help="where the dictionary was trained: blocks.1.attn.hook_z")
    parser.add_argument("-o", "--output", metavar="FOLDER", type=Path, required=True)
    parser.add_argument("--report", metavar="FILE.html", type=Path, help="a report for the cards to link back to")
    parser.add_argument(
        "--labels", metavar="FILE", type=Path, help="names of features: Neuronpedia's export, JSON or CSV"
    )
    parser.add_argument(
        "--ledger", metavar="LEDGER.json", type=Path, help="pages for the channels that its rows name, too"
    )
    parser.add_argument(
        "--strongest", type=int, default=STRONGEST, help=f"channels of a head that get a page (default: {STRONGEST})"
    )
    parser.add_argument(
        "--documents", type=int, help="how many of the target's texts (default: all; 60 at an attention input)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quiet", action="store_true")
    try:
        run(**vars(parser.parse_args(argv)))
    except FraError as error:
        print(f"fra.cards: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
