"""Tasks on workers that may be lost: what a lost one had is done again by another."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from fra.errors import FraError
from fra.workers.cluster import Crew

Task = TypeVar("Task")
Result = TypeVar("Result")
Say = Callable[[str], None]
_WAITING_S = 60.0
"""After so long without a word from any worker it is said that there is none."""
_TRIED = 3
"""Workers that may be lost as they start, one after another, before it is given up."""


class Lost(NamedTuple):
    """Stands for the result of a task whose workers were lost as often as it may be tried."""

    times: int


class Worker:
    """What runs in a process of Ray's: made ready at its first task, so that what is wrong is that task's error."""

    def __init__(self, make: Any):
        self._make = make
        self._work: Any = None

    def ready(self) -> None:
        """Answers."""

    def do(self, task: Any) -> Any:
        """The result of a task."""
        if self._work is None:
            self._work = self._make()
        return self._work(task)


@dataclass(eq=False)
class _Hired:
    actor: Any
    tasks: deque[int] = field(default_factory=deque)
    """What it was given and has not given back, in the order in which it works."""


class _Pool:
    def __init__(self, crew: Crew, make: Callable[[], Callable[[Any], Any]], tasks: Sequence[Any], say: Say):
        self._ray, self._crew, self._tasks, self._say = crew.ray, crew, tasks, say
        self._make = crew.ray.put(make)  # once, not once a worker
        self._actor = crew.ray.remote(Worker).options(num_cpus=1, num_gpus=int(crew.gpu), max_restarts=0)
        self.waiting = deque(range(len(tasks)))
        self._open: dict[Any, tuple[_Hired, int | None]] = {}
        """What is asked of workers: of a new one whether it is there (None), else a task's number."""
        self._hired: list[_Hired] = []
        self._losses: Counter[int] = Counter()
        self._unready = 0

    def hire(self) -> None:
        """One more worker, which is given work when it answers: one that finds no room must not keep any."""
        hired = _Hired(self._actor.remote(self._make))
        self._open[hired.actor.ready.remote()] = hired, None
        self._hired.append(hired)

    def hand_out(self, hired: _Hired, depth: int, last: int) -> None:
        """Tasks to a worker, `depth` at most, none of number `last` or beyond."""
        while len(hired.tasks) < depth and self.waiting and self.waiting[0] < last:
            number = self.waiting.popleft()
            self._open[hired.actor.do.remote(self._tasks[number])] = hired, number
            hired.tasks.append(number)

    def next(self, tries: int) -> tuple[_Hired, int | None, Any]:
        """A worker that has answered, with the number and result of its task; None of a new one, and where its task is
        to be done again.
        """
        while True:
            ready, _ = self._ray.wait(list(self._open), timeout=_WAITING_S)
            if ready:
                break
            if not any(hired.tasks for hired in self._hired):
                self._say("no worker has answered yet: Ray finds no room for one, or they are still starting")
        hired, number = self._open.pop(ready[0])
        try:
            result = self._ray.get(ready[0])
        except self._ray.exceptions.RayActorError:
            return self._lose(hired, number, tries)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        if number is not None:
            hired.tasks.remove(number)
        self._unready = 0
        return hired, number, result

    def _lose(self, hired: _Hired, number: int | None, tries: int) -> tuple[_Hired, int | None, Any]:
        """Another worker in the place of one that was lost; what it had waits again, the first perhaps for ever."""
        self._hired.remove(hired)
        self._open = {ref: asked for ref, asked in self._open.items() if asked[0] is not hired}
        failed = None
        if hired.tasks:
            at_work = hired.tasks[0]
            self._losses[at_work] += 1
            if self._losses[at_work] >= tries:
                failed = hired.tasks.popleft()
            self.waiting.extendleft(reversed(hired.tasks))
            self._say("a worker was lost: what it had is done again" if failed is None else "a worker was lost")
        else:
            self._say("a worker was lost")
            self._unready += 1
            if self._unready >= _TRIED * self._crew.n:
                raise FraError(
                    "workers end as they start: each needs the memory of one process, and this version of fra and its "
                    "libraries on its machine."
                )
        hired.tasks.clear()
        self.hire()
        return hired, failed, None if failed is None else Lost(self._losses[failed])

    def end(self) -> None:
        """No worker goes on."""
        for hired in self._hired:
            self._ray.kill(hired.actor)

    def has(self, hired: _Hired) -> bool:
        """Whether a worker is still there."""
        return hired in self._hired


def as_done(
    crew: Crew,
    make: Callable[[], Callable[[Task], Result]],
    tasks: Sequence[Task],
    *,
    tries: int,
    depth: int = 1,
    window: int | None = None,
    say: Say = lambda _: None,
) -> Iterator[tuple[int, Result | Lost]]:
    """The number and result of each task as it is done. `make` is called once a worker, and what it returns for every
    task there; both, tasks and results must be what Ray can send.

    tries: how many workers a task may lose. depth: tasks that a worker is given at once, so that none waits between
    two. window: how far tasks may be ahead of the first that is not done. Raises what a task raises, and FraError where
    no worker can be had.
    """
    pool = _Pool(crew, make, tasks, say)
    try:
        for _ in range(min(crew.n, len(tasks))):
            pool.hire()
        left = set(range(len(tasks)))
        answering: list[_Hired] = []
        while left:
            last = len(tasks) if window is None else min(left) + window
            answering = [hired for hired in answering if pool.has(hired)]
            for level in range(1, depth + 1):  # everybody one before anybody two
                for hired in answering:
                    pool.hand_out(hired, level, last)
            hired, number, result = pool.next(tries)
            if hired not in answering:
                answering.append(hired)
            if number is not None:
                left.discard(number)
                yield number, result
    finally:
        pool.end()


def in_order(
    crew: Crew,
    make: Callable[[], Callable[[Task], Result]],
    tasks: Sequence[Task],
    *,
    tries: int = 3,
    say: Say = lambda _: None,
) -> Iterator[Result]:
    """The result of each task, in order, as `as_done`; workers are at most some tasks ahead, which bounds what is held.
    Raises FraError for a task with which `tries` workers were lost.
    """
    held: dict[int, Result] = {}
    following = 0
    for number, result in as_done(crew, make, tasks, tries=tries, depth=2, window=8 * crew.n, say=say):
        if isinstance(result, Lost):
            raise FraError(
                f"{result.times} workers were lost with the same work (killed, or out of memory): ask for fewer, "
                "or give each machine more memory."
            )
        held[number] = result
        while following in held:
            yield held.pop(following)
            following += 1
