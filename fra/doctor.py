"""What is there and whether it fits: versions, device and threads, and of a target what a person asks first when its
numbers look odd. `fra doctor [TARGET]`

Nothing here ends at the first thing that is wrong: every question is asked, and what refuses an answer is said beside
it. Importing this module is light; a target is loaded when one is asked about.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from fra.errors import FraError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Int
    from torch import Tensor

    from fra.targets.admission import AtHook
    from fra.targets.target import Target

_LIBRARIES = ("fra", "torch", "transformer_lens", "sae_lens", "transformers", "numpy", "scipy", "statsmodels", "pytest")
_ALIKE = 1e-3
"""Of explained variance: processings that differ by less are the same to a dictionary."""
AS_NAMED = "as named"
_WIDE = 110
_MOVES = 1e-4
"""Of the loss, in nats a token: what zeros at a hook must cost for the model to be read there."""


def versions() -> dict[str, str]:
    """Python and the libraries that numbers rest on."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def driver_cuda() -> str | None:
    """The newest CUDA that the NVIDIA driver allows, as nvidia-smi says it; None where it says nothing."""
    try:
        said = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"CUDA Version: *([0-9.]+)", said)
    return found and found[1]


def no_cuda() -> str:
    """Why torch finds no CUDA device, with the versions of CUDA that torch was built for and that the driver allows."""
    import torch

    what = "torch finds no CUDA device here"
    if torch.version.cuda is None:
        return f"{what}: torch {torch.__version__} is a build without CUDA (README, Hardware: TORCH_INDEX)"
    allowed = driver_cuda()
    if allowed is None:
        return f"{what}: torch is built for CUDA {torch.version.cuda}, and no NVIDIA driver answers (nvidia-smi)"
    return (
        f"{what}: torch is built for CUDA {torch.version.cuda} and the driver allows CUDA {allowed}; where torch's is "
        "newer, update the driver or take another build (README, Hardware: TORCH_INDEX)"
    )


@dataclass(frozen=True)
class Machine:
    """Where numbers are made."""

    versions: dict[str, str]
    system: str
    devices: tuple[str, ...]
    """What torch can measure on."""
    no_gpu: str | None
    """Why there is no GPU among them."""
    cores: int
    threads: int
    """Of torch."""
    memory: float | None
    """In GiB; None where the system does not say."""
    environment: dict[str, str]
    """Variables that change what is measured, or where files are sought."""


_VARIABLES = ("FRA_TARGET", "FRA_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")


def machine() -> Machine:
    """This machine, this environment."""
    import torch

    gpus = [f"cuda:{n} ({torch.cuda.get_device_name(n)})" for n in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, OSError, ValueError):
        memory = None
    return Machine(
        versions=versions(),
        system=f"{platform.system()} {platform.machine()}",
        devices=("cpu", *gpus, *mps),
        no_gpu=None if gpus or mps else no_cuda(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory=memory,
        environment={name: os.environ[name] for name in _VARIABLES if name in os.environ},
    )


@dataclass(frozen=True)
class DictionaryHealth:
    """One dictionary on the beginnings of the target's documents, the first position of each left out."""

    hook: str
    d_sae: int
    architecture: str
    l0: float
    """Features live at a position, on average."""
    explained_variance: float
    loss_recovered: float | None
    """(zeros - dictionary) / (zeros - clean), of the model's loss with either in the activation's place; None where
    zeros there cost nothing.
    """
    silent: float
    """Share of the features that are live at none of these positions: so many are dead at most."""
    positions: int


@dataclass
class Diagnosis:
    """What was found; a question that could not be answered is in `problems` and missing elsewhere."""

    target: str | None = None
    machine: Machine | None = None
    facts: dict[str, str] = field(default_factory=dict)
    """What the target is, in words."""
    fits: dict[str, dict[str, float]] = field(default_factory=dict)
    """Explained variance by processing and hook: every processing tried with every dictionary."""
    dictionaries: list[DictionaryHealth] = field(default_factory=list)
    hooks: dict[str, str] = field(default_factory=dict)
    """By layer: "as named", or what is wrong."""
    remarks: list[str] = field(default_factory=list)
    """What is to be known of the text; nothing is wrong with the target for it."""
    problems: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        """Whether something about the target refused an answer, or gave a wrong one."""
        return bool(self.problems) or any(said != AS_NAMED for said in self.hooks.values())

    @contextmanager
    def asking(self) -> Iterator[None]:
        """A question whose refusal is kept as a problem, once."""
        try:
            yield
        except FraError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def examine(
    name: str | None = None,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    documents: int = 8,
    progress: Callable[[str], None] = lambda _: None,
) -> Diagnosis:
    """Looks at this machine and, where one is named, at a target (a preset or a target file).

    documents: how many of the target's texts, 128 tokens of each. Raises FraError for a target file that cannot be
    read, and for documents below 1; what is wrong with what it names is in `Diagnosis.problems`.
    """
    if documents < 1:
        raise FraError(f"--documents is {documents}: at least one is needed.")
    found = Diagnosis(target=name, machine=machine())
    if name is None:
        return found
    from fra.targets.file import read_target
    from fra.targets.target import open_target

    read_target(name)
    with found.asking():
        _examine(found, open_target(name, device=device, dtype=dtype), documents, progress)
    return found


def _examine(found: Diagnosis, target: Target, documents: int, progress: Callable[[str], None]) -> None:
    from fra.targets.preflight import preflight
    from fra.targets.processing import NAMED, describe

    found.facts["model"] = (
        f"{target.spec.model.source}, {target.n_layers} layers of {target.n_heads} heads, {target.dtype}"
    )
    own = _processing_of(found, target)
    with found.asking():
        found.remarks += preflight(target)
    ways = {describe(way): way for way in ([] if own is None else [own]) + list(NAMED.values())}
    texts: list[Int[Tensor, " pos"]] = []
    tried: dict[str, Target] = {}
    for word, way in ways.items():
        progress(f"the model with processing {word}")
        tried[word] = target.under(way)
        with found.asking():
            if not texts:
                texts = _texts(found, tried[word], documents)
            found.fits[word] = _explained(found, tried[word], texts, progress)
        if own is None or way != own:
            tried[word].__dict__.pop("model", None)  # one at a time in memory
    best = _best(found.fits)
    word = describe(own) if own is not None else best or next(iter(ways))
    if texts:
        _dictionaries(found, tried[word], texts, progress)
        with found.asking():
            _hooks(found, tried[word], texts[0])
    if own is not None and best is not None and best != word:
        found.problems.append(
            f"the dictionaries explain more with processing {best!r} than with {word!r}: they were probably trained "
            "under it; set model.processing in the target file."
        )


def _processing_of(found: Diagnosis, target: Target) -> frozenset[str] | None:
    """The processing that target file or dictionaries name; None where nobody does, or where they disagree."""
    from fra.targets.processing import describe

    own: frozenset[str] | None = None
    with found.asking():
        own = target.processing
        said = "the target file says" if target.spec.model.flags is not None else "the dictionaries say"
        found.facts["processing"] = f"{describe(own)}, as {said}"
    return own


def _texts(found: Diagnosis, target: Target, documents: int) -> list[Int[Tensor, " pos"]]:
    """The beginnings of the target's documents, and what is to be said of them."""
    from fra.targets import provenance
    from fra.targets.admission import sample

    bos = target.bos
    found.facts["BOS"] = "none" if bos is None else f"{target.tokenizer.decode([bos])!r} ({bos})"
    text = provenance.text(target)
    found.facts["first tokens"] = " ".join(map(repr, text["first_tokens"]))
    found.facts["text"] = f"{text['n_documents']} documents of {text['n_sources']} independent sources"
    return sample(target, documents)


def _seen(target: Target, hook: str, texts: Sequence[Int[Tensor, " _pos"]]) -> list[AtHook]:
    import torch

    from fra.targets.admission import see

    with torch.no_grad():
        return [see(target, hook, tokens) for tokens in texts]


def _explained(
    found: Diagnosis, target: Target, texts: Sequence[Int[Tensor, " _pos"]], progress: Callable[[str], None]
) -> dict[str, float]:
    """Variance explained by every dictionary that can be read there."""
    from fra.targets.admission import quality_of

    explained = {}
    for hook in target.dictionaries:
        progress(f"  {hook}")
        with found.asking():
            explained[hook] = quality_of(target, hook, _seen(target, hook, texts)).explained_variance
    return explained


def _dictionaries(
    found: Diagnosis, target: Target, texts: Sequence[Int[Tensor, " _pos"]], progress: Callable[[str], None]
) -> None:
    """What each dictionary does, and costs the model."""
    import torch

    from fra.interventions.patching import losses_under, splice
    from fra.targets.admission import quality_of

    for hook in target.dictionaries:
        progress(f"{hook}: loss recovered")
        with found.asking():
            seen = _seen(target, hook, texts)
            quality = quality_of(target, hook, seen)
            loss = dict.fromkeys(("clean", "dictionary", "zeros"), 0.0)
            for tokens, one in zip(texts, seen, strict=True):
                put = {"clean": one.x, "dictionary": one.x - one.error, "zeros": torch.zeros_like(one.x)}
                for arm, value in put.items():
                    value = torch.cat([one.x[:1], value[1:]])  # the first position stays as it is
                    changes = [] if arm == "clean" else [splice(target.model, hook, value)]
                    loss[arm] += float(losses_under(target.model, tokens[None], *changes).double().sum())
            costs = loss["zeros"] - loss["clean"]
            live = set(torch.cat([one.feature[one.row > 0] for one in seen]).tolist())
            found.dictionaries.append(
                DictionaryHealth(
                    hook=hook,
                    d_sae=quality.d_sae,
                    architecture=quality.architecture,
                    l0=quality.l0,
                    explained_variance=quality.explained_variance,
                    loss_recovered=(loss["zeros"] - loss["dictionary"]) / costs
                    if costs > _MOVES * quality.positions
                    else None,
                    silent=1 - len(live) / quality.d_sae,
                    positions=quality.positions,
                )
            )


def _hooks(found: Diagnosis, target: Target, tokens: Int[Tensor, " pos"]) -> None:
    """Whether scores, pattern and weights agree in every layer, read at its dictionary's hook or at the one before
    the norm.
    """
    from fra.core.frozen import freeze
    from fra.dictionaries.hooks import LayerHooks

    for layer in range(target.n_layers):
        inputs = LayerHooks(layer).inputs()
        hook = next((hook for hook in inputs if hook in target.dictionaries), LayerHooks(layer).resid_pre)
        try:
            freeze(target.model, tokens[None], layer, hook)
            found.hooks[f"L{layer}"] = AS_NAMED
        except FraError as error:
            found.hooks[f"L{layer}"] = str(error)


def _best(fits: dict[str, dict[str, float]]) -> str | None:
    """The processing under which the dictionaries explain most together, of those that can be read under each; None
    where it makes no difference to them.
    """
    shared = set.intersection(*map(set, fits.values())) if fits else set()
    if len(fits) < 2 or not shared:
        return None
    totals = {word: sum(by_hook[hook] for hook in shared) / len(shared) for word, by_hook in fits.items()}
    if max(totals.values()) - min(totals.values()) < _ALIKE:
        return None
    return max(totals, key=lambda word: totals[word])


def screen(found: Diagnosis) -> list[str]:
    """The diagnosis as lines of text, to be read and to be pasted into an issue."""
    lines = []
    if (here := found.machine) is not None:
        lines.append(", ".join(f"{name} {version}" for name, version in here.versions.items()))
        memory = "" if here.memory is None else f", {here.memory:.0f} GiB"
        threads = f"{here.threads} thread{'' if here.threads == 1 else 's'}"
        lines.append(f"{here.system}, {here.cores} cores{memory}; torch: {threads}, {', '.join(here.devices)}")
        if here.no_gpu:
            lines.append(here.no_gpu)
        if here.environment:
            lines.append(" ".join(f"{name}={value}" for name, value in here.environment.items()))
    if found.target is None:
        return lines
    lines += ["", f"target {found.target}"]
    lines += [f"  {name:<13} {text}" for name, text in found.facts.items()]
    if found.fits:
        tried = [f"{word} {_mean(by_hook):.3f}" for word, by_hook in found.fits.items() if by_hook]
        best = _best(found.fits)
        verdict = "either fits" if best is None else f'"{best}" fits'
        if tried:
            lines.append(f"  {'tried':<13} {verdict}: variance explained under {', '.join(tried)}")
    if found.dictionaries:
        width = max(len(one.hook) for one in found.dictionaries)
        head = f"{'kind':>10} {'features':>8} {'L0':>6} {'expl.':>6} {'loss':>6} {'silent':>6}"
        lines += ["", f"  {'dictionary':<{width}} {head}"]
        for one in found.dictionaries:
            loss = "-" if one.loss_recovered is None else f"{one.loss_recovered:.3f}"
            lines.append(
                f"  {one.hook:<{width}} {one.architecture[:10]:>10} {one.d_sae:>8} {one.l0:>6.1f} "
                f"{one.explained_variance:>6.3f} {loss:>6} {one.silent:>6.1%}"
            )
        lines.append(
            f"  on {found.dictionaries[0].positions} positions; expl.: variance explained; loss: share of the loss "
            "recovered,"
        )
        lines.append("  against zeros; silent: features live at none of them, so many are dead at most")
    if found.hooks:
        wrong = {layer: text for layer, text in found.hooks.items() if text != AS_NAMED}
        fine = len(found.hooks) - len(wrong)
        lines += ["", f"  attention hooks show what their names say in {fine} of {len(found.hooks)} layers"]
        lines += [f"  {layer}: {text}" for layer, text in wrong.items()]
    lines += ["", *_wrapped("! ", found.problems), *_wrapped("- ", found.remarks)]
    return lines if found.wrong else [*lines, "nothing is wrong"]


def _wrapped(mark: str, sentences: Sequence[str]) -> Iterator[str]:
    for sentence in sentences:
        yield from textwrap.wrap(sentence, _WIDE, initial_indent=mark, subsequent_indent="  ")


def _mean(by_hook: dict[str, float]) -> float:
    return sum(by_hook.values()) / len(by_hook)
