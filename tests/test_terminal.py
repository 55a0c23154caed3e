import os
import subprocess
import sys

import pytest
from conftest import ROOT

from pcl import terminal

PRINTS = """
import os, sys
from pcl.terminal import open_streams, tell, warn
open_streams()
opened = os.open(os.devnull, os.O_RDONLY)
for _ in range(3):
    tell("x" * 100_000)
    warn("y" * 100_000)
child = os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", "import sys; sys.exit(sys.stdout is None)"])
os.write(os.open(os.environ["OUT"], os.O_CREAT | os.O_WRONLY), f"{opened > 2} {child}".encode())
"""


@pytest.mark.parametrize(
    "streams", [">&-", ">/dev/full", "2>&-", "2>/dev/full", "<&- >&- 2>&-", "| head -c 1", "2>&1 | head -c 1"]
)
def test_what_is_printed_is_never_worth_a_run(tmp_path, streams):
    command = ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {streams}', sys.executable, PRINTS]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "OUT": str(tmp_path / "out")}, capture_output=True)
    assert ended.returncode == 0, ended.stderr[-500:]
    assert (tmp_path / "out").read_text() == "True 0"
    assert b"Error" not in ended.stderr


INTERRUPTED = """
import signal
from pcl.terminal import leave_on_signals
class Loader:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
class Damaged:
    def __del__(self):
        raise ValueError("told as ever")
signal.signal(signal.SIGINT, signal.default_int_handler)
with leave_on_signals():
    damaged, loader = Damaged(), Loader()
    del damaged
    del loader
    print("went on")
"""


def test_ctrl_c_while_an_object_is_deleted_ends_the_process():
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr.endswith("ValueError: told as ever\n\nstopped\n")


def test_streams_that_another_has_set_are_left_alone(capsys):
    before = sys.stdout, sys.stderr
    terminal.open_streams()
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Käse 猫 Ω", "Käse 猫 Ω"),
        ("a\x1b[31mb\x9b2Jc", "a\\x1b[31mb\\x9b2Jc"),
        ("one\ntwo\rthree\x07", "one\\ntwo\\rthree\\x07"),
        ("\u202egnp.exe caf\udce9", "\\u202egnp.exe caf\\udce9"),
    ],
)
def test_what_commands_a_terminal_is_escaped(capsys, text, shown):
    terminal.tell(text)
    terminal.warn(text)
    assert capsys.readouterr() == (shown + "\n", shown + "\n")


@pytest.mark.parametrize(("before", "after"), [((1024, 2**20), 2**16), ((1024, 4096), 4096), ((2**18, 2**20), None)])
def test_as_many_files_as_allowed_may_be_open(monkeypatch, before, after):
    given = []
    monkeypatch.setattr(terminal.resource, "getrlimit", lambda _: before)
    monkeypatch.setattr(terminal.resource, "setrlimit", lambda _, limits: given.append(limits))
    terminal.open_streams()
    assert given == ([(after, before[1])] if after else [])
