"""Settings: gin syntax on disk and on the command line, strict typed sections in Python.

A config file holds lines such as

    include 'countdown_cpu.gin'      # first; beside this file, or a packaged one
    size = 64                        # a macro
    Model.hidden_size = %size
    Optim.learning_rate = 5e-4
    aspo.cap = 3.0                   # a keyword argument of the factory `aspo`

and ``--set Optim.learning_rate=1e-3`` overrides one of them. A binding is a valid Python
assignment, so it is read with `ast`; only literals are accepted and nothing is executed. Every
mistake raises `ConfigError` with its place, what was found and what was expected.

Rooms: `gin` (syntax), `sections` (the settings), `schema` (their types in words, the help page),
`checks` (what they say of each other), `reading` (from files and flags to a `Config`).
No other package reads config files; below `policy` and `parts` every function takes values.
"""

from aspo_jax.config.gin import ConfigError, diff_text
from aspo_jax.config.reading import config_flags, packaged, parse_config, read, read_config
from aspo_jax.config.sections import Config, Origin, command

__all__ = [
    "Config",
    "ConfigError",
    "Origin",
    "command",
    "config_flags",
    "diff_text",
    "packaged",
    "parse_config",
    "read",
    "read_config",
]
