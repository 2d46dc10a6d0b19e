"""Which fixture modules are plugins. `fixtures.threads` first: it must come before numpy and torch."""

pytest_plugins = [
    "fixtures.threads",
    "fixtures.devices",
    "fixtures.options",
    "fixtures.target",
    "fixtures.stimuli",
    "fixtures.verdict",
    "fixtures.resume",
    "fixtures.session",
    "fixtures.kept",
]
