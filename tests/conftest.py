"""Every test session: four simulated CPU devices, compiled programs kept, all cores at work."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

CACHE = Path("~/.cache/aspo_jax/tests").expanduser()
MOST_WORKERS = 8  # each holds about 1.5 GiB; the longest files take as long with more
LONG = ("test_export.py", "test_learner.py", "test_sampler.py", "test_hosts.py", "test_resume.py")

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the real hub; read when it is imported
# JAX does not lock its cache: what another process is writing cannot be read and is compiled anew.
os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation cache entry"
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker per core, but no more than there are files; one file is read in this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    named = [Path(argument.partition("::")[0]) for argument in config.args]
    files = len(set(named)) if all(path.is_file() for path in named) else MOST_WORKERS
    workers = min(cores or 1, files, MOST_WORKERS)
    return workers if workers > 1 else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files begin first, for they are not divided: no worker ends long after all."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Make a folder once for all workers: ``once(name, make)``; the others wait for the first."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder_of(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture
def has_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN seems to be installed, and its GPU a new one: programs can be traced for it."""
    from jax._src.cudnn import fused_attention_stablehlo as stablehlo

    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91500)
    monkeypatch.setattr(stablehlo, "check_compute_capability", lambda _: True)


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
