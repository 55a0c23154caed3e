"""What is printed: losing it never ends a run, and what comes from files gives a terminal no commands."""

from __future__ import annotations

import io
import os
import sys
import threading
from typing import Any, TextIO

from tqdm import tqdm

tqdm.set_lock(threading.RLock())  # its own one is of several processes: a named semaphore, which a killed run may leave


class _LossyFile(io.FileIO):
    """Takes everything; what a full disk, a closed pipe or a terminal that is gone does not take is lost."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def open_streams() -> None:
    """Where a process begins: make stdout and stderr safe to print to.

    Those that are closed become /dev/null. Otherwise the next file that is opened would take their place, and with it what is
    printed.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for number, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)
        if before is getattr(sys, f"__{name}__"):  # a stream that somebody else has set is left alone
            file = io.BufferedWriter(_LossyFile(number, "w", closefd=False))
            encoding = before.encoding if before else "utf-8"
            setattr(sys, name, io.TextIOWrapper(file, encoding, "backslashreplace", line_buffering=True))


def printable(text: str) -> str:
    """The text in one line; what is not printable, such as a newline or an escape sequence in a file's name, is escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def tell(message: str, stream: TextIO | None = None) -> None:
    """Print one line, beside a progress bar if there is one; by default on stdout."""
    stream = stream or sys.stdout
    encoding = stream.encoding or "utf-8"
    tqdm.write(printable(message).encode(encoding, "backslashreplace").decode(encoding), file=stream)
    stream.flush()


def warn(message: str) -> None:
    """The same on stderr."""
    tell(message, sys.stderr)
