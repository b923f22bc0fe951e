"""`aspo_jax.files`: whole or not there; what was changed is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aspo_jax import files
from aspo_jax.errors import WriteError
from aspo_jax.files import Damaged, check_digests, digests, read_sealed, sealed_text


def test_write_text_atomic(tmp_path: Path):
    path = tmp_path / "a.json"
    files.write_text_atomic(path, "old")
    files.write_text_atomic(str(path), "new é\n")
    assert path.read_text(encoding="utf-8") == "new é\n"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_write_without_room_leaves_the_old_text_and_nothing_else(tmp_path: Path, full_disk):
    path = full_disk / "a.json"
    files.write_text_atomic(path, "old")
    message = r"cannot write .*/a.json: No space left on device \(1.0 of 1.0 MiB free\); make room"
    with pytest.raises(WriteError, match=message):
        files.write_text_atomic(path, "x" * 2**21)
    assert path.read_text() == "old"
    assert os.listdir(full_disk) == ["a.json"]


def test_what_was_sealed_comes_back_and_nothing_else_does(tmp_path: Path):
    path = tmp_path / "sealed.json"
    with pytest.raises(FileNotFoundError):
        read_sealed(path)
    text = sealed_text({"a": [1, "é"]})
    path.write_text(text)
    assert read_sealed(path) == {"a": [1, "é"]}
    for bad in (text.replace("1", "2"), text[:-1], "", "{}", "[" * 100_000, '{"manifest": 3}'):
        path.write_text(bad)
        with pytest.raises(Damaged, match="sealed.json (cannot be read|is damaged)"):
            read_sealed(path)


def test_a_changed_file_is_named(tmp_path: Path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a"
    path.write_bytes(b"abc")
    known = digests(tmp_path)
    check_digests(tmp_path, known)
    path.write_bytes(b"abd")
    with pytest.raises(Damaged, match="in/a is damaged"):
        check_digests(tmp_path, known)
    path.write_bytes(b"ab")
    with pytest.raises(Damaged, match="in/a has 2 bytes, expected 3"):
        check_digests(tmp_path, known)
    path.unlink()
    with pytest.raises(Damaged, match="in/a is missing"):
        check_digests(tmp_path, known)
