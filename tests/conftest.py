"""Every test session: four simulated CPU devices, and compiled programs kept for later sessions."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

CACHE = Path("~/.cache/aspo_jax/tests").expanduser()

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory with room for 1 MiB."""
    folder = tmp_path / "full_disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
