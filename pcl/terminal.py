"""What is printed: losing it never ends a run, and what comes from files gives a terminal no commands."""

import io
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker, util
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

from pcl.errors import INTERRUPTED, PREEMPTED

tqdm.set_lock(threading.RLock())  # its own one is of several processes: a named semaphore, which a killed run may leave


class _LossyFile(io.FileIO):
    """Takes everything; what a full disk, a closed pipe or a terminal that is gone does not take is lost."""

    def write(self, data: Any) -> int:
        with suppress(OSError):
            return super().write(data) or len(data)
        return len(data)


def open_streams() -> None:
    """Where a process begins: make stdout and stderr safe to print to.

    Those that are closed become /dev/null. Otherwise the next file that is opened would take their place, and with it what is
    printed. Raises the limit of open files, of which each loader process takes a few, to what this process may have.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2**16 if hard == resource.RLIM_INFINITY else min(hard, 2**16)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(ValueError, OSError):  # macOS names a limit that it does not give
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
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


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def handle(signals: Iterable[int], handler: Callable[[int, Any], Any]) -> None:
    """Set the handler of these signals, except of those that are ignored, as under nohup or in a shell's background job."""
    for number in signals:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


@contextmanager
def leave_on_signals() -> Iterator[None]:
    """Where a script begins. As long as no process is watched, a signal ends it at once, with its own code."""
    open_streams()
    handle(set(SIGNALS) - {signal.SIGINT}, lambda *_: leave_now(PREEMPTED))
    sys.unraisablehook = _end_if_interrupted
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def _end_if_interrupted(dropped: Any) -> None:
    """Python drops what is raised while an object is deleted; a loader takes a while for that, so Ctrl-C may come then."""
    if dropped.exc_type is KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        leave_now(INTERRUPTED)
    sys.__unraisablehook__(dropped)


def leave_now(code: int) -> NoReturn:
    """End this process, whatever it is doing; its loader's workers and the names that they have in the system end with it."""
    # They are multiprocessing's: sockets in a folder, semaphores. None of its locks may hold up the end.
    cleaning = threading.Thread(target=util._exit_function, daemon=True)  # type: ignore[attr-defined]
    cleaning.start()
    cleaning.join(5)
    os._exit(code)


@contextmanager
def shielded() -> Iterator[None]:
    """What is started inside never receives one of `SIGNALS`, also if it is sent to all: this process alone deals with them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # which is inherited
    try:
        resource_tracker.ensure_running()  # Python's own helper; unblocks some of them
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
