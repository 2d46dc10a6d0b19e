"""GPUs that are not there: tensors on the CPU that say they are on cuda:0 or cuda:1, and operations that refuse to mix
them as torch does. What is computed is computed on the CPU, so that numbers can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

CPU = "cpu"
_MOVES = {Tensor.to, Tensor.cpu, Tensor.type_as}
_COPIES = {Tensor.copy_}
_ASKS = {Tensor.device.__get__: lambda tag: torch.device(tag), Tensor.is_cuda.__get__: lambda tag: tag != CPU}
_PRODUCTS = {torch.matmul, torch.bmm, torch.einsum, torch.nn.functional.linear, Tensor.matmul, Tensor.__matmul__}
_INDEXES = {Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put_, Tensor.index_put}


def tag_of(tensor: Tensor) -> str:
    """The device that a tensor says it is on."""
    return getattr(tensor, "_fake_device", CPU)


def put(tensor: Tensor, device: Any) -> Tensor:
    """Says that a tensor is on a device."""
    tensor._fake_device = str(device)  # type: ignore[attr-defined]
    return tensor


class FakeDevices(TorchFunctionMode):
    """Within it cuda:0 and cuda:1 are devices."""

    def __init__(self, spoil: float = 0.0, width: int | None = None) -> None:
        """spoil: by what share every product of matrices on a GPU is too large; width: of those with that dimension."""
        super().__init__()
        self.moves, self.spoil, self.width = 0, spoil, width

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in _ASKS:
            return _ASKS[function](tag_of(args[0]))
        if function is Tensor.numpy and tag_of(args[0]) != CPU:
            raise TypeError(f"can't convert {tag_of(args[0])} device type tensor to numpy. Use Tensor.cpu() first")
        if function in _MOVES:
            return self._move(function, args, kwargs)
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        named = kwargs.get("device")
        if named is not None:
            kwargs["device"] = None if not tensors or function is torch.tensor else CPU
        tag = str(torch.device(named)) if named is not None else self._meet(function, args, tensors)
        found = function(*args, **kwargs)
        wide = self.width is None or any(self.width in tensor.shape for tensor in tensors)
        if self.spoil and tag != CPU and function in _PRODUCTS and wide:
            found = found * (1 + self.spoil)
        return tree_map_only(Tensor, lambda out: out if _inplace(out, tensors) else put(out, tag), found)

    def _move(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        own, rest = args[0], list(args[1:])
        tag = CPU if function is Tensor.cpu else tag_of(own)
        if "device" in kwargs:
            tag = str(torch.device(kwargs.pop("device") or tag))
        for at, given in enumerate(rest):
            if isinstance(given, (str, torch.device)):
                tag, rest[at] = str(torch.device(given)), CPU
            elif isinstance(given, int) and not isinstance(given, bool):
                tag, rest[at] = f"cuda:{given}", CPU
            elif isinstance(given, Tensor):
                tag = tag_of(given)
        moved = function(own, *rest, **kwargs)
        if tag == tag_of(own) and moved is own:
            return moved
        if tag != tag_of(own):
            self.moves += 1
        return put(moved.clone() if moved is own else moved, tag)

    def _meet(self, function: Any, args: Any, tensors: list[Tensor]) -> str:
        """The device of an operation's tensors. Raises RuntimeError where there are several."""
        if function in _INDEXES:
            own, index = args[0], tree_flatten(args[1])[0]
            for one in index:
                if isinstance(one, Tensor) and tag_of(one) not in (CPU, tag_of(own)):
                    raise RuntimeError(f"indices should be on cpu or on {tag_of(own)}, and are on {tag_of(one)}")
            return tag_of(own)
        if function in _COPIES:
            return tag_of(args[0])
        full = {tag_of(one) for one in tensors if one.dim() or tag_of(one) != CPU}
        if len(full) > 1:
            name = getattr(function, "__name__", function)
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {sorted(full)} in {name}")
        return full.pop() if full else CPU


def _inplace(out: Tensor, given: list[Tensor]) -> bool:
    return any(out is one for one in given)


def lay_over(model: Any, second_from: int) -> Any:
    """Puts a TransformerBridge on two devices, from a layer on the second, as accelerate does: what goes into a block,
    and what goes out of the last, is moved.
    """

    def arriving(device: str) -> Callable[..., Any]:
        def move(module: Any, args: Any, kwargs: Any) -> Any:
            return tree_map_only(Tensor, lambda x: x.to(device), (args, kwargs))

        return move

    for parameter in (*model.parameters(), *model.buffers()):
        put(parameter, "cuda:0")
    for block in list(model.blocks)[second_from:]:
        for parameter in (*block.parameters(), *block.buffers()):
            put(parameter, "cuda:1")
        block.register_forward_pre_hook(arriving("cuda:1"), with_kwargs=True)
    model.ln_final.register_forward_pre_hook(arriving("cuda:0"), with_kwargs=True)
    model.cfg.device, model.cfg.n_devices = "cuda:0", 2
    return model
