"""Two workers of Ray on one machine, one of them killed: what it had is done again, and nothing is another number.

One file, so that Ray is started once; it is skipped where Ray is not installed.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import fra
from fra._census import census as census_module
from fra._census import observe
from fra._census.census import gather, prepare
from fra.commands import app
from fra.errors import FraError
from fra.tests.models import random_tokens, tiny, tiny_sae
from fra.tests.suites import CLAIM_FILE, ROOT, Suite, suite  # noqa: F401  (a fixture)
from fra.tests.tiny_targets import one_sentence
from fra.tests.workers import lossy
from fra.workers import cluster
from fra.workers.cluster import check_workers, crew, parse_workers
from fra.workers.pool import Lost, as_done, in_order

HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    found = pytest.importorskip("ray", reason="Ray is not installed: pip install 'fra[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        found.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
        yield found
        found.shutdown()


def test_a_lost_workers_tasks_are_done_again_and_results_keep_their_order(ray: Any, tmp_path: Path) -> None:
    said: list[str] = []
    make = partial(lossy.make, tmp_path)
    with crew(2, gpu=False) as found:
        results = list(in_order(found, make, list(range(20)), say=said.append))
        assert [square for square, _ in results] == [number * number for number in range(20)]
        died = int((tmp_path / "died").read_text())
        assert results[lossy.ONCE][1] != died, "what it had was done by another"
        assert [line for line in said if "lost" in line] == ["a worker was lost: what it had is done again"]
        left: dict[int, Any] = dict(as_done(found, make, [1, lossy.DEADLY, 2], tries=1))
        assert left[1] == Lost(1)
        assert (left[0][0], left[2][0]) == (1, 4), "one task's end is not that of the others"
        with pytest.raises(FraError, match="1 workers were lost with the same work"):
            list(in_order(found, make, [lossy.DEADLY], tries=1))
        with pytest.raises(FraError, match=r"^this task is wrong$"):
            list(in_order(found, make, [lossy.WRONG]))
    assert ray.is_initialized(), "a Ray that was there is left as it is"
    with pytest.raises(FraError, match="workers=3, and Ray has 2 CPUs"), crew(3, gpu=False):
        pass
    with pytest.raises(FraError, match="Ray has 0 GPUs here"), crew("auto", gpu=True):
        pass


def kill_a_worker() -> None:
    """One of Ray's workers, as soon as it is at work on a task (its first, for which it loads the model)."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if "".join(child.cmdline()[:1]).startswith("ray::Worker.do"):
                    child.send_signal(signal.SIGKILL)
                    return
        time.sleep(0.05)


def test_a_census_on_workers_is_the_serial_one_to_the_bit_though_one_is_killed(
    ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "TOKENS_AT_ONCE", 160)
    target = fra.load_target("mini")
    _, sae = target.dictionary_for(1)
    documents = [target.tokens(document.text, 40 + number) for number, document in enumerate(target.documents()[:40])]
    options: Any = {"reduce": ("sum", "mass"), "stripes": [[1, 5]] * 40, "follow": torch.tensor([[5, 6], [7, 8]])}
    planned = prepare(target.model, sae, documents, 1, **options)
    alone = gather(planned, tmp_path / "alone", 8)
    said: list[str] = []
    seen: list[int] = []

    killing = threading.Thread(target=kill_a_worker)
    killing.start()
    shared = gather(planned, tmp_path / "shared", 8, progress=seen.append, workers=2, say=said.append)
    killing.join()
    assert [line for line in said if "lost" in line] == ["a worker was lost: what it had is done again"]
    assert seen == sorted(seen) and seen[-1] == 40 and len(seen) == len(planned.batches)
    own, its = shared.corpus.tensors(), alone.corpus.tensors()
    assert own.keys() == its.keys() and "inputs" in own
    for name, tensor in its.items():
        assert own[name].dtype == tensor.dtype and torch.equal(own[name], tensor), name
    assert shared.channels("mass", n=20).equals(alone.channels("mass", n=20))
    assert shared.followed().equals(alone.followed())
    parts = [sorted(path.name for path in (tmp_path / name).glob("part-*")) for name in ("alone", "shared")]
    assert parts[0] == parts[1] and len(parts[0]) > 2
    said.clear()
    again = gather(planned, tmp_path / "shared", 8, workers=2, say=said.append)
    assert torch.equal(again.corpus.value, alone.corpus.value) and not said, "nothing was left to do"


def test_what_a_worker_makes_is_held_against_what_the_caller_has(monkeypatch: pytest.MonkeyPatch) -> None:
    cloudpickle = pytest.importorskip("ray.cloudpickle", reason="Ray is not installed: pip install 'fra[ray]'")
    documents = [random_tokens(12, seed) for seed in range(3)]
    planned = prepare(tiny("gpt_neo"), tiny_sae(HOOK), documents, 1)  # a HookedTransformer, which goes as it is
    there = cloudpickle.loads(cloudpickle.dumps(census_module.elsewhere(planned)))
    (found,) = there()([(documents, [0, 1, 2], [[], [], []])])
    corpus = planned.observe([0, 1, 2])
    assert all((found[name] == tensor.numpy()).all() for name, tensor in corpus.tensors().items())
    with pytest.raises(FraError, match="a worker's model or dictionary is another"):
        dataclasses.replace(there, expected=("0", there.expected[1]))()
    with pytest.raises(FraError, match="TransformerBridge that was not loaded by") as caught:
        fra.census(tiny("llama"), tiny_sae(HOOK), documents, 1, workers=1)
    one_sentence(caught.value)
    target = fra.load_target("mini")
    _, sae = target.dictionary_for(1)
    with torch.no_grad():
        next(target.model.parameters()).mul_(2)  # of a layer below: the census's own weights are what they were
    planned = prepare(target.model, sae, [target.tokens("the cat sat")], 1)
    with pytest.raises(FraError, match="a worker's model or dictionary is another"):
        census_module.elsewhere(planned)()


def test_bad_numbers_of_workers_get_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'fra[ray]'")
    assert parse_workers(None) is None and parse_workers("auto") == "auto" and parse_workers("12") == 12
    for wrong in ("0", "-1", "two", "1.5", ""):
        with pytest.raises(FraError, match="is no number of workers") as caught:
            parse_workers(wrong)
        one_sentence(caught.value)
    for wrong in (0, True, 2.0):
        with pytest.raises(FraError, match="is no number of workers"):
            check_workers(wrong)
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with pytest.raises(FraError, match=r"Ray, which is not installed: pip install 'fra\[ray\]'") as caught:
        fra.census(tiny("gpt_neo"), tiny_sae(HOOK), [random_tokens(5, 0)], 1, workers=2)
    one_sentence(caught.value)


LOSES = """
import os, signal, sys

if "--target" in sys.argv:
    name = os.path.basename(sys.argv[sys.argv.index("--target") + 1])
    with open(f"seen-{name}", "a") as file:
        print(os.getpid(), file=file)
    tried = len(open(f"seen-{name}").read().split())
    if name == "one.toml" and tried == 1:
        os.kill(os.getppid(), signal.SIGKILL)  # the worker, and with it this process
        signal.pause()
    if name == "two.toml" and tried != 2:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def mini_as(suite: Suite, name: str) -> str:  # noqa: F811
    text = (ROOT / "fixtures" / "targets" / "mini.toml").read_text()
    text = text.replace('"../', f'"{ROOT}/fixtures/').replace('name = "mini"', f'name = "{name}"')
    (suite.path / f"{name}.toml").write_text(text)
    return f"{name}.toml"


def test_claims_on_several_targets_with_lost_workers_and_what_is_not_run_again(
    ray: Any,
    suite: Suite,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(suite.path)
    suite.claims(heads=CLAIM_FILE.replace("raise ZeroDivisionError", "return"))
    conftest = suite.path / "conftest.py"
    conftest.write_text(LOSES + conftest.read_text())
    targets = [mini_as(suite, name) for name in ("one", "two")]
    output = suite.path / "out"

    def run(*arguments: str) -> tuple[int, list[str]]:
        code = app.main(["run", *arguments, "-o", str(output), "--device", "cpu"])
        return code, capsys.readouterr().err.splitlines()

    code, said = run(*targets, "--workers", "2", "-k", "L0H0 or L0H1")
    assert code == 1, said
    assert said[0] == "2 targets, 2 workers"
    assert said.count("a worker was lost: what it had is done again") == 1
    told = {line.split("] ")[1] for line in said if line.startswith("[")}
    words = "1 SUPPORTED, 1 REFUTED; claims fail"
    assert told == {f"one: {words}", f"two: {words}"}
    for name in targets:
        tried = (suite.path / f"seen-{name}").read_text().split()
        assert len(tried) == 2, "once more where a worker or process is lost, not where claims fail"
        assert not [pid for pid in tried if Path(f"/proc/{pid}").exists()], "no run outlives its worker"
    rows = json.loads((output / "one.json").read_text())["verdicts"]
    assert {row["head"] for row in rows} == {"L0H0", "L0H1"} and {row["target"] for row in rows} == {"one"}

    code, said = run(*targets, "-k", "L0H0 or L0H1")  # without Ray, and nothing is run
    assert code == 1
    kept = [f"{name}: {words} (was there already)" for name in ("one", "two")]
    assert [line.split("] ")[1] for line in said if line.startswith("[")] == kept
    with (suite.path / "two.toml").open("a") as file:
        file.write("# changed\n")
    code, said = run(*targets, "-k", "L0H0 or L0H1")
    assert code == 4
    lost = "two: lost 2 times with its process (signal 9); the same command goes on with it"
    assert [line.split("] ")[1] for line in said if line.startswith("[")] == [kept[0], lost]
    assert len((suite.path / "seen-two.toml").read_text().split()) == 4
    assert len((suite.path / "seen-one.toml").read_text().split()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one.toml", "one.toml", "-o", "out"], "two targets are called 'one'"),
        (["nowhere.toml", "-o", "out"], "there is no target 'nowhere.toml'"),
        (["one.toml", "-o", "out", "--claims", "none"], "there is no claims folder none"),
        (["one.toml", "-o", "out", "--workers", "0"], "is no number of workers"),
        (["one.toml", "-o", "out", "--workers", "2", "--device", "cuda:1"], "say --device cuda"),
        (["one.toml", "-o", "one.toml"], "cannot be written"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(
    arguments: list[str],
    message: str,
    suite: Suite,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'fra[ray]'")
    monkeypatch.chdir(suite.path)
    mini_as(suite, "one")
    assert app.main(["run", *arguments]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list((suite.path / "out").glob("*.json"))
