"""Run a command and end it, with all its processes, when who started this goes away.

    python keeper.py COMMAND ...

Standard input is a pipe of the process that wants the command. However that ends, by a kill -9
too, the pipe closes; the command's process group is then asked to end, and soon after made to. A
signal that asks this process to end does the same. Its exit status is the command's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE_S = 10.0  # between asking a group to end and making it


def main(command: list[str]) -> int:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def wait(until) -> None:
        until()
        stop.set()

    for until in (child.wait, lambda: os.read(0, 1)):
        threading.Thread(target=wait, args=(until,), daemon=True).start()
    stop.wait()
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
    return child.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
