"""One message and status 2 for what a person can mend; a traceback for the rest."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys

import pytest

from aspo_jax.errors import UserError, WriteError, run_command, writing


def run(error: BaseException) -> int:
    def command() -> int:
        raise error

    return run_command(command)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("mend it"), "mend it"),
        (FileNotFoundError(2, "", "/a"), "/a: No such file or directory; check the path"),
        (PermissionError(13, "", "/a"), "/a: Permission denied; choose a place that you have"),
        (OSError(errno.ENOSPC, ""), "No space left on device; make room there"),
        (OSError(errno.EFBIG, ""), "File too large; raise the limit of a file's size (ulimit -f)"),
    ],
)
def test_what_a_person_can_mend(error, message, capsys):
    assert run(error) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    "error", [ValueError("x"), OSError("x"), FileNotFoundError(2, "x"), OSError(9, "x", "/a")]
)
def test_what_the_program_did_wrong_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run(error)


def test_writers_in_other_languages_have_errors_of_their_own():
    for text in ("disk [os_error_code='28']", "No space left (os error 28)"):
        message = "cannot write /: No space left on device .*MiB free"
        with pytest.raises(WriteError, match=message), writing("/"):
            raise ValueError(text)
    with pytest.raises(ValueError, match="other"), writing("/"):
        raise ValueError("other")


PRINTS = """
import os
import sys
from aspo_jax.errors import run_command

def command():
    for i in range(20000):
        print(i)
        print(i, file=sys.stderr)
    others = [open(sys.argv[1] + name, "w") for name in "abc"]  # not as descriptors 0 to 2
    with open(sys.argv[1], "w") as file:
        for descriptor in (1, 2):
            try:
                os.write(descriptor, b"what compiled code says")
            except OSError:
                pass  # where the reader went before anything was printed
        file.write("done")
    return 0

sys.exit(run_command(command))
"""


@pytest.mark.parametrize(
    "shell", ["{} | head -1", "{} 2>&1 | head -1", "{} >&-", "{} 2>&-", "{} >&- 2>&-"]
)
def test_a_reader_that_goes_away_ends_nothing(shell, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PRINTS)
    command = shell.format(f"{sys.executable} {program} {tmp_path / 'out'} <&-")
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_text() == "done"
    assert [(tmp_path / f"out{name}").read_text() for name in "abc"] == [""] * 3
    assert "rror" not in done.stderr


def test_a_terminal_that_is_gone_ends_nothing(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PRINTS)
    leader, follower = os.openpty()
    process = subprocess.Popen(
        [sys.executable, str(program), str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    os.read(leader, 10)
    os.close(leader)  # from now on writing is EIO
    assert process.wait(60) == 0
    assert (tmp_path / "out").read_text() == "done"


@pytest.mark.parametrize(
    "path", ["", "a\0b", "\udc80", "~nosuchuser/run", "gs://bucket/run", "x" * 300]
)
@pytest.mark.parametrize("command", ["plot", "export", "check"])
def test_no_path_of_a_command_ends_in_a_traceback(command: str, path: str, capsys):
    module = importlib.import_module(f"aspo_jax.{command}")
    arguments = [path, "out"] if command == "export" else [path]
    with pytest.raises(SystemExit, match="2"):
        module.main(arguments)
    assert capsys.readouterr().err.startswith("error: argument ")
