"""Runs a port in a process of its own, so that a crash or a hang is a row of the report.

The child reads one case per line and answers with one line of JSON. What the port prints, from C as
well, goes to standard error.
"""

import contextlib
import ctypes
import json
import os
import queue
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from threading import Thread

from .kit import Row, left_out, load_port, offers, outcome_of, row_of
from .vectors import Vectors, load_vectors

LOADING = 300.0  # seconds that a port may take to be imported


class Child:
    """A process with the port. One that has died is started again for the next case."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.offered = self._start()

    def _start(self) -> list[str]:
        """Start the process → what the port offers. ValueError if it can't be imported."""
        command = [sys.executable, "-m", "resa.conformance", "--child", self.module]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.replies: queue.Queue[str] = queue.Queue()
        Thread(target=self._read, args=(self.process, self.replies), daemon=True).start()
        reply = self._reply(LOADING)
        if isinstance(reply, str):
            raise ValueError(f"MODULE: got {self.module} ({reply} while it was imported)")
        if "refused" in reply:
            raise ValueError(reply["refused"])
        return reply["offers"]

    @staticmethod
    def _read(process: subprocess.Popen, replies: "queue.Queue[str]") -> None:
        for reply in process.stdout:
            replies.put(reply)
        replies.put("")

    def _reply(self, timeout: float) -> dict | str:
        """Wait for an answer; a process that gives none is ended, and what it did is told."""
        try:
            reply = self.replies.get(timeout=timeout)
        except queue.Empty:
            self.stop()
            return f"no result within {timeout:g} s"
        if reply:
            return json.loads(reply)
        code = self.process.wait()
        return f"the process ended, {f'signal {-code}' if code < 0 else f'exit status {code}'}"

    def outcome(self, entry: Mapping, timeout: float) -> dict:
        """Run one case."""
        says = f"{entry['says']} ({{}})"
        if self.process.poll() is not None:
            try:
                self._start()
            except ValueError as error:
                return {"law": entry["law"], "says": says.format(error)}
        with contextlib.suppress(OSError):  # the pipe is closed: the reply says so
            self.process.stdin.write(json.dumps([entry["operation"], entry["case"]]) + "\n")
            self.process.stdin.flush()
        reply = self._reply(timeout)
        if isinstance(reply, str):
            return {"law": entry["law"], "says": says.format(reply)}
        return reply

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def check_module(
    module: str,
    vectors: Vectors,
    entries: Sequence[Mapping],
    *,
    ops_only: bool = False,
    timeout: float = 60.0,
) -> Iterator[Row]:
    """Check a port by its name or path, case by case, each within `timeout` seconds."""
    child, rows = Child(module), []
    try:
        for entry in entries:
            status = left_out(entry, child.offered, ops_only=ops_only)
            outcome = {} if status else child.outcome(entry, timeout)
            rows.append(row_of(entry, status, outcome, rows))
            yield rows[-1]
    finally:
        child.stop()


def serve(module: str) -> None:
    """Answer cases from standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def answer(reply: Mapping) -> None:
        answers.write(json.dumps(reply) + "\n")

    try:
        port, vectors = load_port(module), load_vectors()
    except ValueError as error:
        answer({"refused": str(error)})
        return
    answer({"offers": offers(port)})
    entries = {(entry["operation"], entry["case"]): entry for entry in vectors.entries()}
    for request in sys.stdin:
        try:
            outcome = outcome_of(port, entries[tuple(json.loads(request))], vectors)
        except Exception as error:  # what a port raises is a verdict already
            outcome = {"law": "9 the kit", "says": f"the kit itself failed: {error!r}"}
        answer(outcome)
        if os.name == "posix":
            ctypes.CDLL(None).fflush(None)  # what C code has not written yet
