"""The command lines: a parser whose errors are one line, and types of numbers and paths."""

import argparse
import os
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from pcl.errors import USER_ERRORS, is_out_of_memory, reason_of
from pcl.terminal import printable


class Parser(argparse.ArgumentParser):
    """Prints defaults in the help, and an error as one line without the usage."""

    def __init__(self, description: str | None = None, prog: str | None = None, **options: Any) -> None:
        super().__init__(prog, description=description, formatter_class=_Formatter, allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if match := re.fullmatch("(--[^=]+=|-[a-z]=?)--", word):  # argparse before Python 3.13 takes that for no value
                self.error(f"argument {match[1].rstrip('=')}: '--' is not a value")
        return super().parse_known_args(words, namespace)

    def error(self, message: str, code: int = 2) -> NoReturn:
        """End with one line."""
        if match := re.match("unrecognized arguments: (--[^ =]+)", message):
            near = get_close_matches(match[1], self._option_string_actions, 1, cutoff=0.9)
            message += f"; did you mean {near[0]}?" if near else "; --help lists the options"
        self.exit(code, f"{self.prog}: error: {printable(message)}\n")

    @contextmanager
    def telling(self, code: int) -> Iterator[None]:
        """Inside, an error that the user can fix ends the program with one line and this exit code."""
        try:
            yield
        except Exception as error:
            if not (isinstance(error, USER_ERRORS) or is_out_of_memory(error)):
                raise
            self.error(reason_of(error), code)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if str(action.default) in ("None", "False", "", "[]") else super()._get_help_string(action)


def _number(kind: type, fits: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        with suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise ArgumentTypeError(f"{text!r} is not {wanted}")

    return parse


def integer(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of an integer from `least` to `most`."""
    return _number(int, lambda value: least <= value <= most, f"an integer from {least} to {most}")


natural, positive = integer(0), integer(1)
batch, side, processes = integer(1, 2**20), integer(1, 2**13), integer(0, 2**10)  # images in a step; pixels; of one machine
seed = integer(0, 2**32 - 1)  # the range that all libraries take
# 1e30 is far within float32.
positive_float = _number(float, lambda value: 0 < value <= 1e30, "a number above 0, at most 1e+30")
nonnegative_float = _number(float, lambda value: 0 <= value <= 1e30, "a number from 0 to 1e+30")
percentage = _number(float, lambda value: 0 < value <= 100, "a number above 0, at most 100")
fraction = _number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
seconds = _number(float, lambda value: 1 <= value <= 2592000, "a number of seconds from 1 to 2592000")


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """The type of a list such as "3,4", in which nothing stands twice."""

    def parse(text: str) -> list[Any]:
        values = [kind(part) for part in text.split(",")]
        if len(set(values)) < len(values):
            raise ArgumentTypeError(f"{text}: a number is listed twice")
        return values

    return parse


integers = several(positive)


def path(text: str) -> Path:
    """A path under which something is, or could be made."""
    return Path(reachable(text))


def reachable(text: str) -> str:
    """`path` as it was written: not an empty one, which an unset variable of a shell gives, nor one below a file."""
    try:
        os.stat(text)
    except FileNotFoundError:
        if not text:
            raise ArgumentTypeError("the path is empty") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL, or what no file's name can hold
        reason = getattr(error, "strerror", None) or error
        raise ArgumentTypeError(f"{text!r} cannot be used: {reason}") from None
    return text
