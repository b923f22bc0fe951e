"""`aspo_jax.run.folder`: one writer, in a folder that is what it should be and stays there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from checkpoint_toy import await_line, start
from etils import epath

from aspo_jax.run import folder as run_folder
from aspo_jax.run.folder import RunFolderError, RunLocked, lock_run


def test_one_writer_per_run_folder(tmp_path: Path):
    program = start("hold_lock", tmp_path)
    await_line(program, "locked")
    expected = rf"{tmp_path} is being written by process {program.pid} on .+ since \d{{4}}-.*wait"
    with pytest.raises(RunLocked, match=expected):
        lock_run(tmp_path)
    (tmp_path / ".lock").unlink()  # what people do with a lock that looks stale
    with pytest.raises(RunLocked, match=r"another process \(its note in .lock is not readable"):
        lock_run(tmp_path)
    program.kill()
    program.communicate(timeout=30)
    mine = pytest.raises(RunLocked, match=f"process {os.getpid()} ")
    with lock_run(tmp_path), mine:
        lock_run(tmp_path)
    lock_run(tmp_path).release()


def test_without_locks_of_folders_the_lock_file_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As on NFS."""
    flock = run_folder.fcntl.flock

    def files_only(descriptor: int, how: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(9, "Bad file descriptor")
        flock(descriptor, how)

    monkeypatch.setattr(run_folder.fcntl, "flock", files_only)
    with lock_run(tmp_path) as lock:
        with pytest.raises(RunLocked):
            lock_run(tmp_path)
        lock.check()
        (tmp_path / ".lock").unlink()
        with pytest.raises(RunFolderError, match="lock was deleted under the run"):
            lock.check()


@pytest.mark.parametrize("note", [b"[" * 100_000, b"\xff", b"{}", b"7"])
def test_a_note_that_cannot_be_read_is_no_traceback(tmp_path: Path, note: bytes):
    with lock_run(tmp_path):
        (tmp_path / ".lock").write_bytes(note)
        with pytest.raises(RunLocked, match="note in .lock is not readable"):
            lock_run(tmp_path)


def test_object_stores_have_no_lock(caplog: pytest.LogCaptureFixture):
    with lock_run(epath.Path("gs://bucket/run")) as lock:
        assert "second writer is not detected" in caplog.text
        lock.check()


def delete(folder: Path) -> str:
    shutil.rmtree(folder)
    return "was deleted or replaced under the run: its metrics and checkpoints are gone"


def replace(folder: Path) -> str:
    shutil.rmtree(folder)
    lock_run(folder).release()  # another run has it now
    return "was deleted or replaced under the run"


def move(folder: Path) -> str:
    folder.rename(folder.with_name("elsewhere"))
    return f"was moved to {folder.with_name('elsewhere')} under the run.*Run.folder"


@pytest.mark.parametrize("change", [delete, replace, move])
def test_a_folder_that_is_no_longer_there_is_noticed(tmp_path: Path, change):
    folder = tmp_path / "run"
    with lock_run(folder) as lock:
        lock.check()
        message = change(folder)
        with pytest.raises(RunFolderError, match=message):
            lock.check()


@pytest.mark.parametrize("name", run_folder.FILES)
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/nowhere")])
def test_what_must_be_a_file_and_is_none_is_named(tmp_path: Path, name: str, make):
    make(tmp_path / name)
    with pytest.raises(RunFolderError, match=rf"{tmp_path / name} is a .+, expected a file: move"):
        lock_run(tmp_path)


@pytest.mark.parametrize("name", run_folder.FOLDERS)
@pytest.mark.parametrize("make", [Path.touch, os.mkfifo])
def test_what_must_be_a_folder_and_is_none_is_named(tmp_path: Path, name: str, make):
    make(tmp_path / name)
    with pytest.raises(
        RunFolderError, match=rf"{tmp_path / name} is a .+, expected a folder: move"
    ):
        lock_run(tmp_path)


def test_a_lock_on_a_device_is_a_message(tmp_path: Path):
    (tmp_path / ".lock").symlink_to("/dev/null")
    with pytest.raises(RunFolderError, match="is a socket or device, expected a file"):
        lock_run(tmp_path)


def test_a_file_in_the_place_of_the_run_folder_is_named(tmp_path: Path):
    (tmp_path / "run").touch()
    with pytest.raises(RunFolderError, match=r"/run: File exists; .*set Run.folder to another"):
        lock_run(tmp_path / "run")
