"""What stands between a caller and the library: the caller's ambient state is set aside, and every error is a sentence.

Autocast, inference mode, another default precision or device, rougher products of matrices (TF32), which a caller may
have switched on around a call, change what torch computes and makes without a word; inside the library nothing but the
model's own settings holds.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch

from fra.errors import FraError

_AUTOCAST = ("cpu", "cuda", "mps")
P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)


@contextmanager
def set_aside() -> Iterator[None]:
    """Without the caller's autocast, inference mode, default precision and device, and rougher products of float32;
    what is not set costs nothing.
    """
    with ExitStack() as stack:
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        default = torch.get_default_dtype()
        if default != torch.float32:
            stack.callback(torch.set_default_dtype, default)
            torch.set_default_dtype(torch.float32)
        products = torch.get_float32_matmul_precision()
        if products != "highest":
            stack.callback(torch.set_float32_matmul_precision, products)
            torch.set_float32_matmul_precision("highest")
        yield


def face(function: Callable[P, R]) -> Callable[P, R]:
    """A function that users call: run with their ambient state set aside; an exception of a library below becomes a
    FraError in a sentence, with the exception itself as its cause. A call that does not fit the signature stays a
    TypeError, and a sum of fra's own that does not add up an ArithmeticError.
    """

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with set_aside():
                return function(*args, **kwargs)
        except FraError:
            raise
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if type(error) is ArithmeticError:  # fra's own sums do not add up: no fault of the input
                raise
            if isinstance(error, TypeError):
                inspect.signature(function).bind(*args, **kwargs)
            raise FraError(sentence(function.__name__, error)) from error

    return called


def facing(cls: C) -> C:
    """A class whose public methods users call, each with its `face`."""
    for name, method in vars(cls).copy().items():
        if inspect.isfunction(method) and not name.startswith("_"):
            setattr(cls, name, face(method))
    return cls


def sentence(what: str, error: BaseException) -> str:
    """An exception that nobody foresaw, in one sentence."""
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[0].strip()[:200].rstrip('.')}" if lines else type(error).__name__
    return f"{what} cannot do this with this model, dictionary or input ({said})."
