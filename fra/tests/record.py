"""`pytest claims -p fra.tests.record [--samples FOLDER]`: keep the samples behind every verdict (fra.tests.recorder).

Light at import: given by -p it comes before the plugins of conftest.py, of which the first must come before numpy.
"""

from __future__ import annotations

from typing import Any

import pytest

FOLDER = "build/samples"
KEY = pytest.StashKey[Any]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--samples", metavar="FOLDER", default=FOLDER, help=f"where samples are kept (default: {FOLDER})")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """A row that is kept from an earlier run has no samples."""
    config.option.fra_no_cache = True


def pytest_sessionstart(session: pytest.Session) -> None:
    """Not where xdist only hands out work."""
    config = session.config
    options = config.pluginmanager.getplugin("fixtures.options")
    run = None if options is None else config.stash.get(options.RUN, None)
    hands_out = getattr(config.option, "dist", "no") != "no" and not hasattr(config, "workerinput")
    if run is not None and not hands_out and not config.option.collectonly:
        from fra.tests.recorder import Recorder

        config.stash[KEY] = Recorder()
        config.stash[KEY].install()


def pytest_sessionfinish(session: pytest.Session) -> None:
    recorder = session.config.stash.get(KEY, None)
    if recorder is not None:
        from fra.tests.recorder import save_all

        recorder.remove()
        save_all(recorder, session.config.invocation_params.dir / session.config.option.samples)
