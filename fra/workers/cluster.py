"""Ray, started or joined: how many workers there are to be, and where they find room."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

from fra.errors import FraError

Workers = int | Literal["auto"]


class Crew(NamedTuple):
    """Where workers go."""

    ray: Any
    """The module."""
    n: int
    """Workers at a time."""
    gpu: bool
    """Whether each has a GPU of its own; else a core with one thread."""


def parse_workers(text: str | None) -> Workers | None:
    """What `--workers` says; None where it says nothing. Raises FraError for what is no number of workers."""
    return None if text is None else check_workers(int(text) if text.isascii() and text.isdigit() else text)


def check_workers(workers: Any) -> Workers:
    """A number of workers, or "auto". Raises FraError for anything else, and where Ray is not installed."""
    if workers != "auto" and (type(workers) is not int or workers < 1):
        raise FraError(f"workers={workers!r} is no number of workers: give one from 1, or auto for one a core or GPU.")
    if find_spec("ray") is None:
        raise FraError("workers need Ray, which is not installed: pip install 'fra[ray]', or leave workers out.")
    return workers  # type: ignore[no-any-return]


@contextmanager
def crew(workers: Workers, *, gpu: bool) -> Iterator[Crew]:
    """Joins the cluster that `ray start` or RAY_ADDRESS names, else starts Ray on this machine alone and ends it after
    the block; a Ray that the caller has started is used and left as it is.

    gpu: a worker has a GPU; else a core, of which Ray on this machine alone is told as many as are asked for. Raises
    FraError for what is no number of workers, without Ray, and where there is less room than `workers` asks for.
    """
    check_workers(workers)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Warns of what will be; the variable is read when Ray is imported, and no worker here is without a GPU by mistake.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray as library

    ray: Any = library
    ours = not ray.is_initialized()
    if ours:
        _begin(ray, 1 if workers == "auto" or gpu else workers)
    try:
        kind = "GPU" if gpu else "CPU"
        room = int(ray.cluster_resources().get(kind, 0))
        n = room if workers == "auto" else workers
        if not 1 <= n <= room:
            raise FraError(
                f"workers={workers}, and Ray has {room} {kind}s here, of which each worker takes one: "
                f"{'ask for fewer' if room else 'measure with --device cpu'}."
            )
        yield Crew(ray, n, gpu)
    finally:
        if ours:
            ray.shutdown()


def _begin(ray: Any, n: int) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(num_cpus=max(n, cores), include_dashboard=False, **quiet)
    except ValueError:  # a cluster that is there says itself what it has
        ray.init(**quiet)
    except (ConnectionError, OSError, RuntimeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FraError(f"Ray cannot be started or joined ({said}): see its logs in /tmp/ray/session_latest.") from error
