"""Errors that a user can fix, and the exit codes of a run."""

import errno
import re

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
PREEMPTED = 75  # exit code after another signal: EX_TEMPFAIL of sysexits.h, "try again"


class RunError(Exception):
    """What ends a run; the message is one line that names the remedy."""


# Of the allocators of torch, faiss, cuBLAS, cuDNN, NCCL and C++.
OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|allocate memory|ALLOC_FAILED|bad_alloc", re.IGNORECASE)
# What a user can fix, told without a traceback: an OSError is a full disk or a folder that is gone, for example.
USER_ERRORS = (RunError, OSError)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of this machine or its GPU has run out."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


def reason_of(error: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(error, RunError):
        return str(error)
    if is_out_of_memory(error):
        return f"out of memory: lower --batch-size or --image-size ({line_of(error)})"
    if isinstance(error, OSError) and error.strerror:
        remedy = "; raise the limit (ulimit -n 4096)" if error.errno == errno.EMFILE else ""
        return (f"{error.filename}: {error.strerror}" if error.filename else error.strerror) + remedy
    return f"{type(error).__name__}: {error}"


def line_of(error: BaseException) -> str:
    """The line of an error that says most: NCCL's last one, of others the first."""
    text = str(error).strip() or type(error).__name__
    last_of_nccl = re.search(r"Last error:\s*(.+)", text)
    return last_of_nccl[1] if last_of_nccl else text.splitlines()[0]
