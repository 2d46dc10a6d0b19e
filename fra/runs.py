"""`fra run TARGET... -o DIR`: every claim on several targets, a run of `pytest claims` with its own ledger each; one
after another, or on workers of Ray.

Beside a ledger `DIR/T.json` stand `DIR/T.log`, what pytest printed, and `DIR/.T.inputs.json`, what the run was made
with. A target whose inputs are the same is not run again; one that was interrupted with the same inputs goes on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fra.errors import CannotLoad, FraError
from fra.verdicts import ledger as ledgers
from fra.verdicts.files import check_writable, write_text
from fra.workers.cluster import crew, parse_workers
from fra.workers.pool import Lost, as_done

Say = Callable[[str], None]
TRIES = 2
"""Of a target whose machine, worker or process is lost."""
DONE = (0, 1)
"""Exit codes of a run that measured everything: claims stand, or some fail."""
_ENDING_S = 30.0
"""That pytest is given to keep its rows when it is told to end."""
_CHILD = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Becomes pytest; before that it asks to be killed with its parent (PR_SET_PDEATHSIG, SIGKILL): a worker that is killed
must not leave a run that writes on. Linux alone can.
"""


@dataclass(frozen=True)
class TargetJob:
    """One target's run."""

    name: str
    target: Path
    claims: Path
    """Their folder; the checkout around it is where pytest runs."""
    folder: Path
    """Of the ledgers."""
    device: str
    select: str | None
    """As pytest's -k."""

    @property
    def ledger(self) -> Path:
        """What the verdicts are written to."""
        return self.folder / f"{self.name}.json"

    @property
    def log(self) -> Path:
        """What pytest prints."""
        return self.folder / f"{self.name}.log"

    @property
    def stamp(self) -> Path:
        """What the ledger was made with."""
        return self.folder / f".{self.name}.inputs.json"


@dataclass(frozen=True)
class Ran:
    """How a target's run ended."""

    code: int
    """pytest's; that of the ledger where nothing was run; negative: the signal that ended it, twice."""
    seconds: float
    kept: bool = False
    """Whether the ledger was there already, of the same inputs."""


def run(
    targets: Sequence[str],
    output: Path,
    *,
    select: str | None = None,
    workers: str | None = None,
    device: str = "auto",
    claims: Path = Path("claims"),
    say: Say = lambda _: None,
) -> int:
    """Runs the claims on every target and says how each ended as it does: 0; 1 where claims fail; 4 where a target was
    refused, lost, or nothing of it was asked.

    select: pytest's -k. workers: processes of Ray, "auto" or a number, each with one target at a time and its GPU,
    which all see `output` and the targets under the same paths; None: one target after another, here. A run that is
    lost with its machine or worker is tried once more, and goes on where it stood; one whose claims fail is not. Raises
    FraError for a target that is none, two of one name, no claims, and an output where another run is at work.
    """
    asked = parse_workers(workers)
    if asked is not None and ":" in device:
        raise FraError(f"--device {device} names one GPU, and workers take one each: say --device cuda.")
    jobs = _jobs(targets, output, select, device, claims)
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(output / ".lock", blocking=False))
        except Timeout as error:
            raise FraError(f"another run is at work in {output}: wait for it, or write to another folder.") from error
        ended: dict[str, Ran | None] = {}
        begun = time.monotonic()
        results: Iterable[tuple[int, Ran | Lost]]
        if asked is None:
            results = _one_by_one(jobs, say)
        else:
            found = stack.enter_context(crew(asked, gpu=_on_gpu(device)))
            say(f"{len(jobs)} targets, {found.n} workers")
            results = as_done(found, _worker, jobs, tries=TRIES, say=say)
        for number, result in results:
            job, ran = jobs[number], None if isinstance(result, Lost) else result
            ended[job.name] = ran
            say(f"[{len(ended)} of {len(jobs)} targets, {time.monotonic() - begun:.0f} s] {job.name}: {told(job, ran)}")
    codes = [4 if ran is None or ran.code not in DONE else ran.code for ran in ended.values()]
    return max(codes)


def _jobs(targets: Sequence[str], output: Path, select: str | None, device: str, claims: Path) -> list[TargetJob]:
    from fra.targets.file import find_target, read_target

    if not claims.is_dir():
        raise FraError(
            f"there is no claims folder {claims}: run this in a checkout with claims, or name it (--claims)."
        )
    check_writable(output / ".inputs")
    folder, jobs = output.resolve(), dict[str, TargetJob]()
    for target in targets:
        spec, _ = read_target(target)
        job = TargetJob(spec.name, find_target(target), claims.resolve(), folder, device, select)
        if (other := jobs.setdefault(spec.name, job)) is not job:
            raise FraError(
                f"two targets are called {spec.name!r} ({other.target} and {job.target}): rename one of them."
            )
    if not jobs:
        raise FraError("there is no target to run: name presets or target files.")
    return list(jobs.values())


def _on_gpu(device: str) -> bool:
    if device == "auto":
        import torch

        return torch.cuda.is_available()
    return device.startswith("cuda")


def _one_by_one(jobs: Sequence[TargetJob], say: Say) -> Iterator[tuple[int, Ran]]:
    for number, job in enumerate(jobs):
        say(f"{job.name}: {job.log} tells how far it is")
        yield number, measure(job)


def _worker() -> Callable[[TargetJob], Ran]:
    """What a worker does with each target."""
    return measure


def told(job: TargetJob, ran: Ran | None) -> str:
    """How a target's run ended, in a line."""
    if ran is None or ran.code < 0:
        how = "its worker" if ran is None else f"its process (signal {-ran.code})"
        return f"lost {TRIES} times with {how}; the same command goes on with it"
    if ran.code not in DONE:
        return f"not measured (pytest ended with {ran.code}): {_last_word(job.log)}"
    counts = Counter(row.verdict for row in ledgers.read(job.ledger).verdicts)
    words = ", ".join(f"{counts[word]} {word}" for word in ledgers.COUNTED if counts[word])
    return f"{words or 'not asked'}" + ("; claims fail" if ran.code else "") + (" (was there already)" * ran.kept)


def _last_word(log: Path) -> str:
    """The line of a log that says what was wrong."""
    try:
        lines = [
            line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
    except OSError:
        return f"there is no {log}"
    wrong = [line for line in lines if line.startswith("ERROR")]
    return (wrong or lines or [f"{log} is empty"])[-1][:300]


def measure(job: TargetJob) -> Ran:
    """One target's run, in a process of its own, unless its ledger is there with the same inputs."""
    begun = time.monotonic()
    now = inputs(job)
    stamp = _stamp(job)
    same = now is not None and stamp.get("inputs") == now
    if same and stamp.get("ledger") == _sha256(job.ledger) and _versions_stand(job.ledger):
        return Ran(int(stamp["code"]), time.monotonic() - begun, kept=True)
    resumed = same and "ledger" not in stamp and job.ledger.exists() and _versions_stand(job.ledger)
    if not resumed:
        job.ledger.unlink(missing_ok=True)
    write_text(json.dumps({"inputs": now}, indent=1), job.stamp)
    code = -1
    for attempt in range(TRIES):
        code = _pytest(job, resume=job.ledger.exists(), again=attempt > 0)
        if code >= 0:
            break
    if code in DONE:
        done = {"inputs": now, "ledger": _sha256(job.ledger), "code": code}
        write_text(json.dumps(done, indent=1), job.stamp)
    return Ran(code, time.monotonic() - begun)


def inputs(job: TargetJob) -> dict[str, Any] | None:
    """What a target's ledger depends on beside the versions of libraries, which it names itself; None where that cannot
    be told, because weights are out of reach or wrong.
    """
    from fra.targets.target import load_target

    try:
        fingerprint = load_target(job.target).fingerprint()
    except (CannotLoad, FraError):
        return None
    return {
        "target": _sha256(job.target),
        "weights, dictionaries and text": fingerprint,
        "code": _code(job.claims),
        "device": job.device,
        "select": job.select,
    }


def _code(claims: Path) -> str:
    """sha256 of the claims, of what runs them and of the library."""
    digest = hashlib.sha256()
    library = Path(__file__).parent
    own = [path for path in library.rglob("*.py") if "tests" not in path.relative_to(library).parts]
    around = claims.parent
    beside = [around / "conftest.py", around / "pyproject.toml", *(around / "fixtures").glob("*.py")]
    beside += [*claims.rglob("*.py"), *claims.rglob("*.toml")]
    for root, files in ((library, own), (around, beside)):
        for file in sorted(files):
            digest.update(f"{file.relative_to(root)} {_sha256(file)}\n".encode())
    return digest.hexdigest()


def _sha256(path: Path) -> str | None:
    with suppress(OSError):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return None


def _stamp(job: TargetJob) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads(job.stamp.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _versions_stand(ledger: Path) -> bool:
    """Whether a ledger was made with the libraries that are installed."""
    try:
        made_with = ledgers.read(ledger).header.versions
        return all(
            version == (platform.python_version() if name == "python" else importlib.metadata.version(name))
            for name, version in made_with.items()
        )
    except (FraError, importlib.metadata.PackageNotFoundError):
        return False


def _pytest(job: TargetJob, *, resume: bool, again: bool) -> int:
    """pytest's exit status for one target; negative where a signal ended it."""
    command = [sys.executable, "-c", _CHILD, sys.executable, "-m", "pytest", str(job.claims)]
    command += ["--target", str(job.target), "--device", job.device, "--ledger", str(job.ledger)]
    command += [*(["--resume"] if resume else []), *(["-k", job.select] if job.select is not None else [])]
    with job.log.open("ab" if again else "wb") as log:
        process = subprocess.Popen(command, cwd=job.claims.parent, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            return process.wait()
        except BaseException:
            process.terminate()  # pytest keeps its rows
            with suppress(subprocess.TimeoutExpired):
                process.wait(_ENDING_S)
            process.kill()
            process.wait()
            raise
