"""What a head and a census show of themselves: HTML in a notebook, figures with matplotlib."""

from __future__ import annotations

import builtins
import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest
import torch

import fra
from fra.core.resolve import ResolvedHead
from fra.errors import FraError
from fra.plot import drawings, pictures
from fra.tests.models import tiny, tiny_sae

HOOK = "blocks.1.ln1.hook_normalized"
LIVE = "<script>alert(1)</script>"


@pytest.fixture
def m() -> ResolvedHead:
    found = fra.resolve(tiny("gpt2"), tiny_sae(HOOK), [0, 5, 9, 5, 9, 11, 5, 9], head="L1H2")
    found.tokens = ["BOS", "a", " b\n", "$x$", LIVE, "e", "f", "g"]
    return found


def _covered(svg: str) -> dict[tuple[int, int], float]:
    """Cells that a pattern's SVG covers, with their opacity: paths followed by hand."""
    cells = {}
    for path in ET.fromstring(svg).iter("path"):
        x = y = 0
        for dx, dy, length in re.findall(r"m(-?\d+) (-?\d+)h(\d+)", path.attrib["d"]):
            x, y = x + int(dx), y + int(dy)
            for s in range(x, x + int(length)):
                cells[y, s] = float(path.attrib["stroke-opacity"])
            x += int(length)
    return cells


def test_attention_is_the_models_own_and_the_edge_is_its_strongest(m: ResolvedHead) -> None:
    own = m.frozen.pattern[0, 2]
    assert torch.allclose(m.attention(), own, atol=1e-5)
    looked = {(t, s): float(own[t, s]) for t in range(m.n_pos) for s in range(1, t)}
    assert m.strongest_edge() == max(looked, key=lambda at: looked[at])
    with pytest.raises(FraError, match="too short"):
        fra.resolve(tiny("gpt2"), tiny_sae(HOOK), [0, 5], head="L1H2").strongest_edge()


def test_a_notebook_shows_tokens_pattern_blocks_and_channels_escaped(m: ResolvedHead) -> None:
    html = m._repr_html_()
    assert "<script" not in html and "&lt;script&gt;" in html and r" b\n" in html
    (svg,) = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    pattern = m.attention()
    full = drawings.full_scale([float(v) for v in pattern.flatten() if v])
    drawn = _covered(svg)
    for t in range(m.n_pos):
        for s in range(m.n_pos):
            share = float(pattern[t, s]) / full
            assert ((t, s) in drawn) == (share >= drawings.FAINTEST), (t, s)
            if (t, s) in drawn:
                assert drawn[t, s] == pytest.approx(min(1, share), abs=0.051)
    pairs = m.n_pos * (m.n_pos + 1) / 2
    for name, block in m.blocks().items():
        assert re.search(rf"{' · '.join(name)}</td>.*?</span> {float(block.abs().sum()) / pairs:.2f}</td>", html)
    for row in m.channels(n=5).itertuples():
        assert re.search(rf">{row.q_feature}</td><td[^>]*>{row.k_feature}</td>", html)
    ET.fromstring(html.replace("&nbsp;", " "))  # well-formed
    assert "L1H2" in html and "ResolvedHead(L1H2" in repr(m)


def test_a_long_document_is_not_drawn(m: ResolvedHead, monkeypatch: pytest.MonkeyPatch) -> None:
    resolving = __import__("fra.core.resolve", fromlist=["_"])
    monkeypatch.setattr(resolving, "_PICTURED", 7)
    assert "<svg" not in m._repr_html_() and "m.plot()" in m._repr_html_()
    many = pictures.pattern_svg(torch.eye(100).tolist(), ["t"] * 100, "long")
    assert [text.text for text in ET.fromstring(many).iter("text")][::2] == ["0", "16", "32", "48", "64", "80", "96"]


def test_without_matplotlib_it_says_what_to_install(m: ResolvedHead, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(FraError, match=r"pip install 'fra\[plot\]'"):
        m.plot()


@pytest.fixture
def pyplot() -> Any:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def test_figures_show_the_numbers_and_are_labelled(m: ResolvedHead, pyplot: Any) -> None:
    shown = fra.plot.pattern(m)
    assert torch.allclose(torch.tensor(shown.images[0].get_array().filled(0)), m.attention(), atol=1e-6)
    assert (shown.get_xlabel(), shown.get_ylabel()) == ("key", "query")
    assert [label.get_text() for label in shown.get_yticklabels()][2:4] == [r" b\n", r"\$x\$"]

    q_pos, k_pos = m.strongest_edge()
    waterfall = fra.plot.blocks(m)
    bars = waterfall.patches
    assert len(bars) == 10
    assert bars[-1].get_width() == pytest.approx(float(m.scores()[q_pos, k_pos]), abs=1e-5)
    assert bars[-2].get_x() + bars[-2].get_width() == pytest.approx(bars[-1].get_width(), abs=1e-4), "it ends there"
    assert f"({q_pos})" in waterfall.get_title() and waterfall.get_xlabel() == "nats"
    with pytest.raises(FraError, match="masked"):
        fra.plot.blocks(m, 1, 3)
    with pytest.raises(FraError, match="both"):
        fra.plot.blocks(m, 1)

    found = m.channels(n=4)
    own = fra.plot.channels(m, 4)
    assert [bar.get_width() for bar in own.patches] == pytest.approx(found["value"].tolist())
    first = own.get_yticklabels()[0].get_text()
    assert first.startswith(f"{found['q_feature'][0]} → {found['k_feature'][0]} (")

    figure = m.plot()
    assert len(figure.axes) == 4, "three and a colour bar"
    figure.canvas.draw()  # tokens with dollar signs are no formulas
    assert len(pyplot.get_fignums()) == 4, "an axes of its own each, and no empty figure"


def test_a_census_is_drawn(pyplot: Any) -> None:
    seen = fra.census(
        tiny("gpt2"), tiny_sae(HOOK), [torch.tensor([0, 5, 9, 5, 9]), torch.tensor([0, 7, 8, 7, 8])], layer=1
    )
    with pytest.raises(FraError, match="say which head"):
        seen.plot()
    drawn = seen.plot("L1H1", n=6)
    table = seen.channels(head="L1H1", n=6)
    assert [bar.get_width() for bar in drawn.patches] == pytest.approx(table["value"].tolist())
    assert "L1H1" in drawn.get_title() and "2 documents" in drawn.get_title()
