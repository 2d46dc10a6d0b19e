"""`fra doctor`: against brute force, and where something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fra
from fra import doctor, targets
from fra.commands import app
from fra.errors import FraError
from fra.tests.models import build_model
from fra.tests.tiny_targets import HEAD_OUTPUT, NORMALIZED, edit_config, signed_axes, write_target, write_text


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose value biases are large, and a dictionary of head outputs that has them in its own bias."""
    folder = tmp_path_factory.mktemp("doctor")
    build_model("gpt2", folder / "model")
    file = folder / "model" / "model.safetensors"
    weights = load_file(file)
    (bias,) = [name for name in weights if name.endswith("h.1.attn.c_attn.bias")]
    width = len(weights[bias]) // 3
    weights[bias][2 * width :] = torch.linspace(-3, 3, width)
    save_file(weights, file, metadata={"format": "pt"})
    signed_axes(folder / NORMALIZED, NORMALIZED)
    signed_axes(folder / HEAD_OUTPUT, HEAD_OUTPUT, reshape_activations="hook_z")
    own = folder / HEAD_OUTPUT / "sae_weights.safetensors"
    save_file({**load_file(own), "b_dec": torch.linspace(-3, 3, width)}, own)
    edit_config(folder / HEAD_OUTPUT, apply_b_dec_to_input=True)
    write_text(folder / "text")
    return folder


def _file(home: Path, folder: str, **keys: str) -> Path:
    return write_target(
        home / folder, home / "model", {h: home / h for h in (NORMALIZED, HEAD_OUTPUT)}, home / "text", **keys
    )


@pytest.fixture(scope="module")
def found(home: Path) -> doctor.Diagnosis:
    return doctor.examine(str(_file(home, "none")))


def test_dictionaries_are_measured_as_admission_and_brute_force_do(home: Path, found: doctor.Diagnosis) -> None:
    target = fra.load_target(_file(home, "none"))
    admitted = {q.hook: q for q in targets.admit(target).dictionaries}
    assert [one.hook for one in found.dictionaries] == [NORMALIZED, HEAD_OUTPUT]
    for one in found.dictionaries:
        own = admitted[one.hook]
        assert (one.l0, one.positions, one.d_sae) == (own.l0, own.positions, own.d_sae)
        assert one.explained_variance == own.explained_variance
        sae, fired, loss = target.dictionaries[one.hook], set[int](), {"clean": 0.0, "zeros": 0.0, "own": 0.0}
        for document in target.documents():
            tokens = target.tokens(document.text, 128)[None]

            def put(value: torch.Tensor, hook: object, how: str, sae: object = sae, fired: set[int] = fired) -> object:
                x = value.flatten(2)
                acts = sae.encode(value if value.ndim == 4 else x)  # type: ignore[attr-defined]
                fired |= set(acts[0, 1:].nonzero()[:, -1].tolist())
                new = {"zeros": torch.zeros_like(x), "own": sae.decode(acts).flatten(2), "clean": x}[how]  # type: ignore[attr-defined]
                return torch.cat((x[:, :1], new[:, 1:]), 1).view_as(value)

            for how in loss:
                hooks = [(one.hook, lambda value, hook, how=how: put(value, hook, how))]
                with torch.no_grad():
                    logits = target.model.run_with_hooks(tokens, fwd_hooks=hooks)[0, :-1].double()
                loss[how] += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        recovered = (loss["zeros"] - loss["own"]) / (loss["zeros"] - loss["clean"])
        if one.loss_recovered is None:
            assert loss["zeros"] - loss["clean"] < 1e-3 * one.positions
        else:
            assert one.loss_recovered == pytest.approx(recovered, abs=1e-3)
        assert one.silent == 1 - len(fired) / one.d_sae
    assert any(one.loss_recovered is not None for one in found.dictionaries)


def test_the_processing_that_fits_is_found_whatever_the_file_says(home: Path, found: doctor.Diagnosis) -> None:
    assert found.problems == []
    assert found.fits["none"][HEAD_OUTPUT] > found.fits["folded"][HEAD_OUTPUT] + 0.1, "value biases folded away"
    other = doctor.examine(str(_file(home, "folded", model_keys='processing = "folded"')))
    assert other.fits == found.fits
    assert "explain more with processing 'none' than with 'folded'" in " ".join(other.problems)
    unsaid = doctor.examine(str(_file(home, "unsaid", model_keys="")))
    assert unsaid.fits == found.fits
    assert "how the model's weights were processed" in " ".join(unsaid.problems)
    assert '"none" fits' in "\n".join(doctor.screen(unsaid))


def test_one_screen_says_it_all(found: doctor.Diagnosis) -> None:
    lines = doctor.screen(found)
    text = "\n".join(lines)
    assert len(lines) <= 40 and max(map(len, lines[4:])) <= 120
    for word in (fra.__version__, torch.__version__, "thread", "2 layers of 4 heads", "BOS", "first tokens", "none"):
        assert word in text
    assert "in 2 of 2 layers" in text and lines[-1] == "nothing is wrong"
    for one in found.dictionaries:
        assert f"{one.l0:.1f}" in text and f"{one.silent:.1%}" in text


def test_json_and_exit_status(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = home / "broken"
    signed_axes(broken / NORMALIZED, NORMALIZED, d_in=16)
    file = write_target(broken, home / "model", {NORMALIZED: broken / NORMALIZED}, home / "text")
    assert app.main(["doctor", str(file), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert any("width 16" in problem for problem in said["problems"])
    assert said["dictionaries"] == [] and said["facts"]["BOS"]
    assert said["hooks"] == {"L0": "as named", "L1": "as named"}
    assert app.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"]["versions"]["fra"] == fra.__version__


def test_hooks_that_do_not_show_what_they_say_are_named(
    found: doctor.Diagnosis, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fra.core import frozen

    real = frozen.freeze

    def freeze(model: object, tokens: torch.Tensor, layer: int, hook: str) -> object:
        if layer == 1 and len(tokens[0]) > 0 and hook.endswith("hook_normalized"):
            raise FraError("the scores of layer 1 are not what its weights make.")
        return real(model, tokens, layer, hook)

    monkeypatch.setattr(frozen, "freeze", freeze)
    said = doctor.examine(str(_file(home, "none")), documents=1)
    assert said.hooks == {"L0": "as named", "L1": "the scores of layer 1 are not what its weights make."}
    assert "in 1 of 2 layers" in "\n".join(doctor.screen(said))


def test_too_few_documents_are_refused() -> None:
    with pytest.raises(FraError, match="at least one is needed"):
        doctor.examine("mini", documents=0)
