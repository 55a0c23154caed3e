"""Errors that a user can mend, and the exit codes of a run."""

from __future__ import annotations

import errno

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
PREEMPTED = 75  # exit code after another signal: EX_TEMPFAIL of sysexits.h, "try again"


class RunError(Exception):
    """What ends a run; the message is one line that names the remedy."""


# What a user can mend, told without a traceback: an OSError is a full disk or a folder that is gone, for example.
USER_ERRORS = (RunError, OSError)


def reason_of(error: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(error, RunError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        remedy = "; raise the limit (ulimit -n 4096)" if error.errno == errno.EMFILE else ""
        return (f"{error.filename}: {error.strerror}" if error.filename else error.strerror) + remedy
    return f"{type(error).__name__}: {error}"
