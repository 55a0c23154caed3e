"""End the processes of a run together: when one gets a signal to stop, when one fails, and when one no longer answers.

Once a second each process writes a beat into a TCPStore, and reads there whether another one got a signal to stop, has failed
or has fallen silent. Threads do so, also while the main thread is deep inside a k-means of minutes. A process that gets a
signal to stop leaves at once, except inside `Watch.finish_before_leaving`.
"""

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

GRACE = 25.0  # seconds that a process has to finish its step and save
SILENCE = 30.0  # seconds without a beat after which a process is given up
STORE_IS_GONE = "process 0 has ended or no longer answers"


class Watch:
    """The watch of this process; one that was not started only knows that there is no signal."""

    def __init__(self, launcher: int | None = None) -> None:
        self.stop_signal = 0  # here or in another process
        self._launcher = launcher  # id of the process that spawned this one; its end is a signal to stop too
        self._stop_time, self._silence = 0.0, SILENCE
        self._finishing = self._leaving = False
        self._closed = threading.Event()
        self._group: dist.ProcessGroup | None = None
        self._rank = self._world = self._node = 0
        self._vote: tuple[torch.Tensor, dist.Work] | None = None
        self._store: dist.Store | None = None
        self._heard = 0.0  # when the store last answered; 0 where there is none
        self._beats: dict[int, tuple[bytes, float]] = {}  # of other ranks: the last one and when it was new

    def start(self) -> "Watch":
        """Take over the signals."""
        # They wake the thread through a pipe, since Python's own handlers wait for the main thread.
        self._inbox, self._outbox = os.pipe()
        os.set_blocking(self._outbox, False)
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            # A signal that is ignored stays so: nohup, or a shell's background job.
            self._before = {s: signal.getsignal(s) for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN}
            for number in self._before:
                signal.signal(number, lambda *_: None)
            signal.set_wakeup_fd(self._outbox, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch_signals, daemon=True)
        self._thread.start()
        return self

    def join(self, group: dist.ProcessGroup | None, address: tuple[str, int], prefix: str, node: int) -> None:
        """Watch the other processes of a group (of gloo) too, by the store at an address, in keys that begin with `prefix`."""
        self._group, self._node, self._address, self._prefix = group, node, address, f"{prefix}/watch"
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        store = self._connect()
        store.set(f"beat/{self._rank}", "0")
        dist.barrier(group)  # from here on everybody has a beat
        self._heard, self._store = time.monotonic(), store
        # A thread of its own, since a request to a frozen store may never return.
        threading.Thread(target=self._talk, daemon=True).start()

    def _connect(self) -> dist.Store:
        """A connection of its own, since one that waits for a key blocks all other requests on it."""
        socket.create_connection(self._address, timeout=SILENCE / 6).close()  # torch's own waiting fills pages with warnings
        patience = timedelta(seconds=SILENCE / 6)
        store = dist.TCPStore(*self._address, is_master=False, wait_for_workers=False, timeout=patience)
        return dist.PrefixStore(self._prefix, store)

    @contextmanager
    def finish_before_leaving(self) -> Iterator[None]:
        """Inside, a process has `GRACE` seconds after a signal to ask `stop_voted`, save and leave by itself."""
        self._finishing = True
        try:
            yield
        finally:
            self._finishing = False

    def stop_voted(self) -> bool:
        """Whether to stop after this step: the same answer on every rank, so each must ask after every step.

        The votes of one step are counted at the next, so that nobody waits.
        """
        stop = self.last_vote()
        if self._group:
            flag = torch.tensor(int(self.stop_signal))
            self._vote = (flag, dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True))
        return stop

    def last_vote(self) -> bool:
        """The result of the last step's vote; nobody votes after the last step of an epoch."""
        if self._vote is None:
            return bool(self.stop_signal) and not self._group  # a single process knows by itself
        flag, work = self._vote
        work.wait()
        self._vote = None
        if flag:
            self._note(int(flag))
        return bool(flag)

    def leave_saved(self) -> NoReturn:
        """End a run that got a signal to stop and has saved."""
        if self._rank == 0:
            print("\nstopped and saved: go on with --resume auto", flush=True)
        if self._group:
            dist.destroy_process_group()  # NCCL complains of a group that is left; all leave at the same vote
        raise SystemExit(self._exit_code)

    @property
    def _exit_code(self) -> int:
        return INTERRUPTED if self.stop_signal == signal.SIGINT else PREEMPTED

    def _leave(self) -> NoReturn:
        if self._leaving:
            time.sleep(60)  # the other thread is at it
        self._leaving = True
        if store := self._answering_store:  # this process is gone before it talks again
            with suppress(RuntimeError):
                store.set("stop", str(int(self.stop_signal)))
        if self._rank == 0:
            if self._world > 1:
                time.sleep(3)  # the others are to hear of it before the store is gone
            lost = "; what came after its last checkpoint is lost" if self._finishing else ""
            print(f"\nstopped{lost}: go on with --resume auto", flush=True)
        leave_now(self._exit_code)

    def wait_for_failure(self) -> None:
        """Another process seems to be gone: wait for its reason; this process ends if that comes, or if others have left."""
        if self._heard:
            self._silence = SILENCE / 8
            time.sleep(3 if self.stop_signal else SILENCE / 2)
        if self.stop_signal:
            self._leave()

    def publish_failure(self, reason: str) -> bool:
        """Let the other processes end with the reason of this one's failure; False if one of this machine was first."""
        first = {"rank": self._rank, "node": self._node, "reason": reason}
        if store := self._answering_store:
            with suppress(RuntimeError):
                first = json.loads(store.compare_set("failure", "", json.dumps(first)))
            if self._rank == 0:
                time.sleep(3)  # the store ends with this process; the others look at it every second
        return first["rank"] == self._rank or first["node"] != self._node

    @property
    def _answering_store(self) -> dist.Store | None:
        return self._store if time.monotonic() - self._heard < SILENCE / 6 else None

    def close(self) -> None:
        """Stop watching, and handle signals as before."""
        self._closed.set()
        os.write(self._outbox, b"\0")
        self._thread.join()
        if self._before:
            signal.set_wakeup_fd(-1)
            for number, handler in self._before.items():
                signal.signal(number, handler)
        os.close(self._inbox)
        os.close(self._outbox)

    def _watch_signals(self) -> None:
        while not self._closed.is_set():
            if select.select([self._inbox], [], [], 1)[0]:
                for number in os.read(self._inbox, 100):
                    if number in self._before:  # the pipe gets those of other handlers too
                        if self.stop_signal and number == signal.SIGINT:  # Ctrl-C again
                            leave_now(INTERRUPTED)
                        self._note(number)
            if self._is_orphan():
                self._note(signal.SIGHUP)
            if self._heard and time.monotonic() - self._heard > self._silence:
                self._end(STORE_IS_GONE, tell=True)
            in_grace = self._finishing and time.monotonic() - self._stop_time < GRACE
            if self.stop_signal and not self._closed.is_set() and not in_grace:
                self._leave()

    def _is_orphan(self) -> bool:
        return bool(self._launcher) and os.getppid() != self._launcher

    def _note(self, number: int) -> None:
        if not self.stop_signal:
            self._stop_time, self.stop_signal = time.monotonic(), number

    def _talk(self) -> None:
        """Write and read, once a second, in the store, which is rank 0's or a launcher's."""
        beat = 0
        while not self._closed.wait(1):
            beat += 1
            try:
                self._store = self._store or self._connect()
                self._exchange(self._store, beat)
                self._heard = time.monotonic()
            except ConnectionRefusedError:  # its process has ended
                if not (self.stop_signal or self._is_orphan()):  # else this one saves, and leaves by itself
                    self._end(STORE_IS_GONE, tell=True)
            except (RuntimeError, OSError):  # of many kinds, such as a pause of the network
                self._store = None

    def _exchange(self, store: dist.Store, beat: int) -> None:
        store.set(f"beat/{self._rank}", str(beat))
        store.wait(["beat/0"], timedelta(seconds=SILENCE / 6))  # a plain request to a frozen store would wait forever
        if store.check(["failure"]):
            failure = json.loads(store.get("failure"))
            if failure["rank"] != self._rank:  # who failed has told on its own machine
                self.stop_signal = 0  # a launcher stops the others of one that has failed
                self._end(f"process {failure['rank']} has failed: {failure['reason']}", tell=failure["node"] != self._node)
        if self.stop_signal and not store.check(["stop"]):
            store.set("stop", str(int(self.stop_signal)))
        elif not self.stop_signal and store.check(["stop"]):
            self._note(int(store.get("stop")))
        others = [r for r in range(self._world) if r != self._rank] if self._rank == 0 else [0]
        now = time.monotonic()
        if now - self._heard > SILENCE / 3:  # this process was frozen itself, and has not heard what others said meanwhile
            self._beats.clear()
        for rank, value in zip(others, store.multi_get([f"beat/{r}" for r in others]), strict=True):
            last, since = self._beats.get(rank, (b"", now))
            self._beats[rank] = (value, now if value != last else since)
            if value == last and now - since > self._silence:
                self.publish_failure(f"process {rank} no longer answers")
                self._end(f"process {rank} no longer answers", tell=True)

    def _end(self, reason: str, tell: bool) -> None:
        if self._closed.is_set():
            return
        if self.stop_signal:  # the others have left
            self._leave()
        if tell:
            warn(f"error: {reason}")
        leave_now(1)
