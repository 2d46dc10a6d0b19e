"""The documentation site: `make docs`. What can be read off the code is written by `reference.py` beside this file."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import reference  # noqa: E402
from docutils.nodes import SkipNode  # noqa: E402
from latex2mathml.converter import convert  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402

import fra  # noqa: E402

project = "fra"
author = "The fra authors"
release = version = fra.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc"]
html_static_path = ["static"]
html_css_files = ["fra.css"]
html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"fra {release}"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
# Notebooks are run while the site is built: what they show is what this version makes.
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE.parent / "build" / "notebooks")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
suppress_warnings = ["mystnb.unknown_mime_type", "docutils"]  # docstrings are plain text with lists, not reST


_OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def outside(app: Sphinx, page: str, source: list[str]) -> None:
    """Links to files beside docs/ lead somewhere in the repository, and here name the file."""
    source[0] = _OUTSIDE.sub(
        lambda link: f"`{link[2]}`" if link[1] in link[2] else f"{link[1]} (`{link[2]}`)", source[0]
    )


def _formula(display: str) -> Callable[[Any, Any], None]:
    def visit(writer: Any, node: Any) -> None:
        made = convert(node.astext(), display=display)
        writer.body.append(f'<div class="formula">{made}</div>' if display == "block" else made)
        raise SkipNode

    return visit


def setup(app: Sphinx) -> None:
    # Formulas are part of the page: the site reads offline, and runs no script for them.
    app.add_html_math_renderer("mathml", (_formula("inline"), None), (_formula("block"), None))
    reference.write(HERE / "generated")
    app.connect("source-read", outside)
