"""Work in which workers die. What it imports is light: every worker imports it, and many are lost."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fra.errors import FraError

ONCE, DEADLY, WRONG = 3, 99, 77
"""Tasks that kill the first worker, every worker, and none but raise."""


def make(folder: Path) -> Callable[[int], tuple[int, int]]:
    return partial(work, folder)


def work(folder: Path, number: int) -> tuple[int, int]:
    mark = folder / "died"
    if number == DEADLY or (number == ONCE and not mark.exists()):
        mark.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    if number == WRONG:
        raise FraError("this task is wrong")
    return number * number, os.getpid()
