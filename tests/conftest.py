"""Every test session: four simulated CPU devices, and compiled programs kept for later sessions."""

from __future__ import annotations

from pathlib import Path

import jax

CACHE = Path("~/.cache/aspo_jax/tests").expanduser()

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
