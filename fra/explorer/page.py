"""The explorer's page: data, style and script in one HTML file that loads nothing.

The numbers lie in `<script type="text/plain">` blocks, which no browser runs; the script and the style are the only
ones that the page's policy lets through, by their hashes. Whatever a token says, it reaches the page as JSON and
is shown as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fra.architectures.known import place_of
from fra.errors import FraError
from fra.explorer import gather, outputs
from fra.explorer.documents import in_documents, words
from fra.explorer.pack import Pack, Precision
from fra.explorer.scores import head_scores
from fra.explorer.upstream import shared_upstream
from fra.verdicts.shown import on_page

if TYPE_CHECKING:
    from fra.targets.target import Target

SCRIPTS = ("read.js", "numbers.js", "search.js", "draw.js", "panels.js", "explorer.js")
"""One script to the page, in this order."""


def _source(*names: str) -> tuple[Markup, str]:
    """Files of this room as one text, and its hash as a policy names it."""
    text = "\n".join(resources.files("fra.explorer").joinpath(name).read_text(encoding="utf-8") for name in names)
    return Markup(text), "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("fra.explorer", "."),
        autoescape=True,
        finalize=on_page,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _as_json(value: Any) -> Markup:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _chosen(
    target: Target, layer: int | None, heads: Sequence[str] | None, scores: dict[str, dict[str, float]]
) -> tuple[int, list[int]]:
    """Layer and heads on the page."""
    if heads is not None:
        if not heads:
            raise FraError('heads is empty: name some, as "L1H4".')
        places = [place_of(layer, name) for name in heads]
        layers = {own for own, _ in places}
        if len(layers) > 1:
            raise FraError(f"the heads {', '.join(heads)} lie in several layers: name heads of one layer.")
        wrong = [name for name, (_, head) in zip(heads, places, strict=True) if head >= target.n_heads]
        if wrong:
            raise FraError(f"there is no head {wrong[0]}: the layers of {target.name!r} have {target.n_heads} heads.")
        return layers.pop(), sorted({head for _, head in places})
    if layer is None:
        if not target.resolvable:
            raise FraError(f"{target.name!r} has no dictionary at any attention input, so no head can be resolved.")
        best = max(target.resolvable, key=lambda name: scores.get(name, {}).get("induction", 0.0))
        layer = place_of(None, best)[0]
    return layer, list(range(target.n_heads))


def render(
    target: Target,
    text: str,
    layer: int | None,
    heads: Sequence[str] | None,
    precision: Precision,
    n_documents: int,
    progress: Callable[[str], None],
) -> str:
    """The page, as HTML text; arguments as of `explore`."""
    progress("what kind of head each is")
    scores = head_scores(target)
    number, chosen = _chosen(target, layer, heads, scores)
    ids = target.tokens(text)
    progress(f"{len(ids)} tokens through layer {number}")
    measured, seen, z_sae = outputs.outputs_of(target, gather.measure(target, ids, number, chosen))
    pack = Pack()
    gather.shared(measured, pack)
    facts = gather.about(measured, text) | {"scores": [scores.get(f"L{number}H{head}") for head in chosen]}
    progress(f"where {len(facts['features'])} features fire in the target's documents")
    facts["examples"], facts["means"] = in_documents(target, measured.sae, measured.live, n_documents)
    facts["outputs"] = None
    if seen is not None:
        facts["outputs"] = about = outputs.about_outputs(target, seen, z_sae)
        about["examples"], _ = in_documents(target, z_sae, torch.unique(seen.live.feature), n_documents)
        outputs.shared_outputs(measured, seen, pack)
    shown = [facts["examples"], *([] if facts["outputs"] is None else [facts["outputs"]["examples"]])]
    facts["words"] = words(target, *shown)
    facts["upstream"] = shared_upstream(measured, pack)
    progress("the page")
    facts["keys_of"] = owners = gather.sharers(measured)
    blocks: list[tuple[str, Markup]] = []
    index: dict[int, Any] = {}
    keys_index: dict[int, Any] = {}
    for head, owner in zip(chosen, owners, strict=True):
        own = Pack()
        gather.of_head(measured, head, own, precision)
        if seen is not None:
            outputs.outputs_of_head(seen, head, own, precision)
        index[head] = own.index
        blocks.append((f"head-{head}", Markup(own.text())))
        if head == owner:
            keys = Pack()
            gather.of_keys(measured, head, keys, precision)
            keys_index[head] = keys.index
            blocks.append((f"keys-{head}", Markup(keys.text())))
    script, script_hash = _source(*SCRIPTS)
    style, style_hash = _source("explorer.css")
    return (
        _environment()
        .get_template("explorer.html.j2")
        .render(
            facts=facts,
            about=_as_json(facts | {"index": pack.index, "head_index": index, "keys_index": keys_index}),
            shared=Markup(pack.text()),
            blocks=blocks,
            script=script,
            script_hash=script_hash,
            style=style,
            style_hash=style_hash,
        )
    )
