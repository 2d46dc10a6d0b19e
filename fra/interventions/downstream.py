"""The rest of the model after one attention layer, run again and again on the same documents with one head changed.

What lies below the layer is computed once: the calls of every block from the layer on are kept and made again, with all
hooks of the model in force. The logits are the model's own; where they are not (a model that does more between its
blocks and its logits), whole passes are run instead.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache

from fra.architectures.architecture import Model
from fra.architectures.known import architecture_of
from fra.core.coded import Arm, measure_arm
from fra.core.output import by_head, check_output, value_terms
from fra.core.weights import OVWeights, ov_weights
from fra.dictionaries.codes import dictionary_hook
from fra.dictionaries.hooks import LayerHooks
from fra.errors import FraError
from fra.interventions.attach import Intervention, unhooked

_ROUNDING = 1e-5
"""Of the largest logit; the products of a GPU may differ by as much from one shape to another."""


class Downstream:
    """The model from attention layer `layer` on, on documents of one length (padded on the right)."""

    @torch.no_grad()
    def __init__(self, model: Model, tokens: Int[Tensor, "batch pos"], layer: int) -> None:
        self.model, self.layer = model, layer
        self._own = architecture_of(model)
        self.tokens = tokens.to(self._own.device)
        self._blocks = list(self._own.blocks)[layer:]
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        outputs: list[Tensor] = []

        def keep(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            # a cache of keys and values would be written a second time
            named = {name: value for name, value in named.items() if not isinstance(value, Cache)}
            inputs = tuple(None if isinstance(value, Cache) else value for value in inputs)
            self._calls.append((inputs, named | {"use_cache": False} if "use_cache" in named else named))

        def look(z: Tensor, hook: Any) -> None:
            outputs.append(z)

        handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in self._blocks]
        reader = Intervention(model, [(LayerHooks(layer).z, look)], [])
        try:
            with unhooked(model), reader:
                truth = model(self.tokens)
        finally:
            for handle in handles:
                handle.remove()
        if not outputs:
            raise FraError(f"hook_z of layer {layer} did not fire: this attention cannot be changed there.")
        self.z: Float[Tensor, "batch pos n_heads d_head"] = by_head(outputs[0], self._own.n_heads)
        """The layer's head outputs, as the model is without hooks."""
        self.whole: bool = not self._blocks or len(self._calls) != len(self._blocks)
        """Whether whole passes are run."""
        if not self.whole:
            with unhooked(model):
                error = (self._again() - truth).abs().max()
            self.whole = not float(error) <= _ROUNDING * float(truth.abs().max())

    @torch.no_grad()
    def logits(self, doc: Int[Tensor, " n"], pos: Int[Tensor, " n"], copies: int = 1) -> Float[Tensor, "n d_vocab"]:
        """The logits at chosen positions of chosen documents, under whatever hooks are on the model's layers from this
        one on. copies: of a single document, run side by side.
        """
        if self.whole:
            every: Tensor = self.model(self.tokens.expand(copies, -1) if copies > 1 else self.tokens)
            return every[doc, pos]
        return self._unembed(self._residual(copies)[doc, pos])

    def _again(self) -> Float[Tensor, "batch pos d_vocab"]:
        return self._unembed(self._residual(1).flatten(0, 1)).view(*self.tokens.shape, -1)

    def _residual(self, copies: int) -> Float[Tensor, "batch pos d_model"]:
        """After the last block and norm."""
        first, named = self._calls[0]
        residual = first[0] if first else named["hidden_states"]
        if copies > 1:
            residual = residual.expand(copies, -1, -1)
        for block, (inputs, named) in zip(self._blocks, self._calls, strict=True):
            if inputs:
                out: Any = block(residual, *inputs[1:], **named)
            else:
                out = block(**(named | {"hidden_states": residual}))
            residual = out[0] if isinstance(out, tuple) else out
        return self._own.normed(residual)

    def _unembed(self, rows: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
        return self._own.unembed(rows[None])[0]

    def shifted(self, head: int | None, delta: Tensor) -> Intervention:
        """Adds `delta` to a head's output at hook_z ([batch, pos, d_head]), or to all of them ([batch, pos, n_heads,
        d_head], head None).
        """

        def edit(z: Tensor, hook: Any) -> Tensor:
            heads = by_head(z, self._own.n_heads)
            if head is None:
                return (heads + delta.to(z)).view_as(z)
            changed = heads.clone()
            changed[:, :, head] += delta.to(z)
            return changed.view_as(z)

        return Intervention(self.model, [], [(LayerHooks(self.layer).z, edit)])


class Scene:
    """Documents at one attention layer, with what it takes to change a head there and to run the rest of the model."""

    def __init__(self, model: Model, sae: Any, tokens: Int[Tensor, "batch pos"], layer: int) -> None:
        """Raises FraError as `fra.resolve` does, and where a head's output is not its pattern times its values."""
        self.arm: Arm = measure_arm(model, sae, tokens, layer, dictionary_hook(sae))
        self.weights: OVWeights = ov_weights(model, layer, self.arm.frozen.hook_name)
        self.down = Downstream(model, tokens, layer)
        self._heads: dict[int, Head] = {}

    def head(self, head: int) -> Head:
        """One head of the layer; computed once."""
        if head not in self._heads:
            self._heads[head] = Head(self, head)
        return self._heads[head]


class Head:
    """One head on the documents of a scene."""

    @torch.no_grad()
    def __init__(self, scene: Scene, head: int) -> None:
        self.scene, self.number = scene, head
        frozen = scene.arm.frozen
        self.scores: Float[Tensor, "batch pos pos"] = frozen.scores(head)
        """Before softcap; -inf where masked."""
        self.pattern: Float[Tensor, "batch pos pos"] = frozen.attention(self.scores)
        self.values: Float[Tensor, "batch pos d_head"] = value_terms(scene.arm, scene.weights, head)
        own = scene.down.z[:, :, head].to(self.values)
        what, so = f"layer {frozen.layer} head {head}", "cannot be changed by its scores alone"
        check_output(architecture_of(scene.down.model), what, self.pattern @ self.values, own, self.values, so)
        self.z = own

    def moved(self, taken: Float[Tensor, "batch pos pos"]) -> Float[Tensor, "batch pos pos"]:
        """What the pattern gains and loses where `taken` is taken out of the scores, before softcap."""
        return self.scene.arm.frozen.attention(self.scores - taken) - self.pattern

    def delta(self, taken: Float[Tensor, "batch pos pos"]) -> Float[Tensor, "batch pos d_head"]:
        """What the head's output changes by; nothing where nothing is taken."""
        return self.moved(taken) @ self.values

    def without(self, taken: Float[Tensor, "batch pos pos"]) -> Intervention:
        """The head with `taken` out of its scores: what `fra.remove` does, computed once."""
        return self.by(self.delta(taken))

    def by(self, delta: Float[Tensor, "batch pos d_head"]) -> Intervention:
        """The head with its output moved by `delta`."""
        return self.scene.down.shifted(self.number, delta)
