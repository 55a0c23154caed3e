"""Ends the processes of a run together: when one is asked to stop, when one fails, and when one no longer answers.

Each process beats once a second through a TCPStore, for the others to see, and looks whether one of them was asked to stop, has
failed or has fallen silent. That is done by threads, also while the main thread is deep inside a k-means of minutes. What is
unfinished is inside `Watch.guarded`: outside it, a process that is asked to stop leaves at once.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from pcl.errors import INTERRUPTED, PREEMPTED
from pcl.terminal import SIGNALS, leave_now, warn

GRACE = 25.0  # seconds that a guarded process has to finish its step and save
STORE_IS_GONE = "process 0 has ended or no longer answers"
SILENCE = 30.0  # seconds without a beat after which a process is given up


class Watch:
    """The watch of this process.

    Args:
        launcher: process id of the one that spawned this, whose end asks to stop too.
    """

    def __init__(self, launcher: int | None = None) -> None:
        self.asked = 0  # the signal that asked to stop, here or in another process
        self._asked_at, self._silence = 0.0, SILENCE
        self._guarded = self._leaving = self._closed = False
        self._launcher = launcher
        self._store: dist.Store | None = None
        self._address = ("", 0)
        self._heard = 0.0  # when the store last answered; 0 where there is none
        self._prefix = ""
        self._end_of_talk = threading.Event()
        self._rank = self._world = self._node = 0
        self._beats: dict[int, tuple[bytes, float]] = {}  # of other ranks: the last one and when it was new
        self._group: dist.ProcessGroup | None = None
        self._question: tuple[torch.Tensor, dist.Work] | None = None
        # Signals wake the thread through a pipe, since Python's own handlers wait for the main thread.
        self._inbox, self._outbox = os.pipe()
        os.set_blocking(self._outbox, False)
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            # One that is ignored stays so: nohup, or a shell's background job.
            self._before = {s: signal.getsignal(s) for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN}
            for number in self._before:
                signal.signal(number, lambda *_: None)
            signal.set_wakeup_fd(self._outbox, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self, group: dist.ProcessGroup, address: tuple[str, int], prefix: str, node: int) -> None:
        """Look after the other processes too.

        Args:
            group: all processes, connected by gloo.
            address: host and port of its store.
            prefix: of the keys of this group in the store.
            node: number of this machine.
        """
        self._group, self._node, self._address, self._prefix = group, node, address, f"{prefix}/watch"
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        store = self._connect()
        store.set(f"beat/{self._rank}", "0")
        dist.barrier(group)  # from here on everybody has a beat
        self._heard, self._store = time.monotonic(), store
        # A thread of its own, since a store that is frozen may never come back from a question.
        threading.Thread(target=self._talk, daemon=True).start()

    def _connect(self) -> dist.Store:
        """A connection of its own, since a store that waits for something lets nobody else through."""
        host, port = self._address
        socket.create_connection(self._address, timeout=SILENCE / 6).close()  # torch's own waiting fills pages with warnings
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=SILENCE / 6))
        return dist.PrefixStore(self._prefix, store)

    def should_stop(self) -> bool:
        """Whether to stop after this step: the same answer on every rank, so each must ask after every step.

        The question of one step is answered at the next, so that nobody waits.
        """
        stop = self.forget_question()
        if self._group:
            flag = torch.tensor(int(self.asked))
            self._question = (flag, dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True))
        return stop

    def forget_question(self) -> bool:
        """The answer to the last step's question, if there is one; after the last step of an epoch nobody else asks."""
        if self._question is None:
            return bool(self.asked) and not self._group  # a single process knows by itself
        flag, work = self._question
        work.wait()
        self._question = None
        if flag:
            self._note(int(flag))
        return bool(flag)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Inside, a process that is asked to stop has `GRACE` seconds to ask `should_stop`, save and leave by itself."""
        self._guarded = True
        try:
            yield
        finally:
            self._guarded = False

    @property
    def exit_code(self) -> int:
        """Of a run that was asked to stop."""
        return INTERRUPTED if self.asked == signal.SIGINT else PREEMPTED

    def leave(self) -> NoReturn:
        """End this process as one that was asked to stop."""
        if self._leaving:
            time.sleep(60)  # the other thread is at it
        self._leaving = True
        if self._rank == 0:
            if self._world > 1:
                time.sleep(3)  # the others are to hear of it before the store is gone
            lost = "; what came after its last checkpoint is lost" if self._guarded else ""
            print(f"\nstopped{lost}: go on with --resume auto", flush=True)
        leave_now(self.exit_code)

    def wait_for_reason(self) -> None:
        """Another process seems to be gone: find out which one and why; ends this one if that is found, or others have left."""
        if self._heard:
            self._silence = SILENCE / 8
            time.sleep(3 if self.asked else SILENCE / 2)
        if self.asked:
            self.leave()

    def tell_failure(self, reason: str) -> bool:
        """Let the other processes end with the reason of this one's failure; False if one of this machine was first."""
        first = {"rank": self._rank, "node": self._node, "reason": reason}
        store = self._store
        if store and time.monotonic() - self._heard < SILENCE / 6:  # it answers
            with suppress(RuntimeError):
                first = json.loads(store.compare_set("failure", "", json.dumps(first)))
            if self._rank == 0:
                time.sleep(3)  # the store ends with this process; the others look at it every second
        return first["rank"] == self._rank or first["node"] != self._node

    def close(self) -> None:
        """Stop watching, and handle signals as before."""
        self._closed = True
        self._end_of_talk.set()
        os.write(self._outbox, b"\0")
        self._thread.join()
        if self._before:
            signal.set_wakeup_fd(-1)
            for number, handler in self._before.items():
                signal.signal(number, handler)
        os.close(self._inbox)
        os.close(self._outbox)

    def _run(self) -> None:
        while not self._closed:
            if select.select([self._inbox], [], [], 1)[0]:
                for number in os.read(self._inbox, 100):
                    if number in self._before:  # the pipe gets those of other handlers too
                        self._ask(number)
            if self._is_orphan() and not self.asked:
                self._ask(signal.SIGHUP)
            if self._heard and time.monotonic() - self._heard > self._silence:
                self._end(STORE_IS_GONE, tell=True)
            self._leave_if_due()

    def _is_orphan(self) -> bool:
        return bool(self._launcher) and os.getppid() != self._launcher

    def _ask(self, number: int) -> None:
        if self.asked and number == signal.SIGINT:  # Ctrl-C again
            leave_now(INTERRUPTED)
        self._note(number)

    def _note(self, number: int) -> None:
        if not self.asked:
            self._asked_at, self.asked = time.monotonic(), number

    def _talk(self) -> None:
        """Tell and hear, once a second, through the store, which is rank 0's or a launcher's."""
        beat = 0
        while not self._end_of_talk.wait(1):
            beat += 1
            try:
                self._store = self._store or self._connect()
                self._exchange(self._store, beat)
                self._heard = time.monotonic()
            except ConnectionRefusedError:  # its process has ended
                if not (self.asked or self._is_orphan()):  # else this one saves, and leaves by itself
                    self._end(STORE_IS_GONE, tell=True)
            except (RuntimeError, OSError):  # of many kinds, such as a pause of the network
                self._store = None

    def _exchange(self, store: dist.Store, beat: int) -> None:
        store.set(f"beat/{self._rank}", str(beat))
        store.wait(["beat/0"], timedelta(seconds=SILENCE / 6))  # one would wait for a frozen store for ever
        if store.check(["failure"]):
            failure = json.loads(store.get("failure"))
            if failure["rank"] != self._rank:  # who failed has told on its own machine
                self.asked = 0  # an outside launcher stops the others of one that has failed
                self._end(f"process {failure['rank']} has failed: {failure['reason']}", tell=failure["node"] != self._node)
        if self.asked and not store.check(["stop"]):
            store.set("stop", str(int(self.asked)))
        elif not self.asked and store.check(["stop"]):
            self._note(int(store.get("stop")))
        others = [r for r in range(self._world) if r != self._rank] if self._rank == 0 else [0]
        now = time.monotonic()
        if now - self._heard > SILENCE / 3:  # this process was frozen itself, and has not heard what others said meanwhile
            self._beats.clear()
        for rank, value in zip(others, store.multi_get([f"beat/{r}" for r in others]), strict=True):
            last, since = self._beats.get(rank, (b"", now))
            self._beats[rank] = (value, now if value != last else since)
            if value == last and now - since > self._silence:
                self.tell_failure(f"process {rank} no longer answers")
                self._end(f"process {rank} no longer answers", tell=True)

    def _leave_if_due(self) -> None:
        if self.asked and not self._closed and not (self._guarded and time.monotonic() - self._asked_at < GRACE):
            self.leave()

    def _end(self, reason: str, tell: bool) -> None:
        if self._closed:
            return
        if self.asked:  # the others have left
            self.leave()
        if tell:
            warn(f"error: {reason}")
        leave_now(1)
