"""Threads that decode: one for a small model, else as many as are free."""

import os
import subprocess
import sys
import time

import pytest
import torch

from resa.reference import GPT, GPTConfig, load_model
from resa.reference.cli import main as command_line
from resa.reference.cli import threads
from resa.reference.weights.checkpoint import shipped_checkpoint

has_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
SMALL_MODEL, LARGE = 135_000_000, 7_000_000_000  # weights


@pytest.mark.parametrize(
    ("n_weights", "free", "most", "chosen"),
    [
        (SMALL_MODEL, 8.0, 8, 1),
        (LARGE, 7.9, 8, 8),
        (LARGE, 8.0, 2, 2),  # torch has no more than this by itself
        (LARGE, 3.2, 8, 3),
        (LARGE, 0.1, 8, 1),
        (LARGE, 8.0, 1, 1),
    ],
)
def test_a_small_model_has_one_thread_and_a_large_one_what_is_free(monkeypatch, n_weights, free, most, chosen):
    monkeypatch.setattr(threads, "free_cores", lambda: free)
    assert threads.choose_threads(n_weights, most) == chosen


@has_affinity
def test_a_busy_core_is_not_free():
    """Measured by a process that may use one core alone, beside another that keeps this core busy."""
    core = min(os.sched_getaffinity(0))
    pin = f"import os; os.sched_setaffinity(0, [{core}])\n"
    busy = subprocess.Popen([sys.executable, "-c", pin + "while True: pass"])
    try:
        time.sleep(0.2)  # until it runs
        ask = f"{pin}from resa.reference.cli.threads import free_cores; print(free_cores())"
        found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, timeout=120)
    finally:
        busy.kill()
        busy.wait()
    assert float(found.stdout) < 0.5


@has_affinity
@pytest.mark.parametrize(
    ("group", "limit", "free"),
    [("0::/", "150000 100000", 1.5), ("1:cpu:/x\n0::/a/b", "20000 100000", 0.2), ("0::/", "max 100000", None)],
)
def test_a_containers_share_is_not_exceeded(monkeypatch, tmp_path, group, limit, free):
    """Read from files as the kernel writes them, of a machine whose eight cores are idle."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    own = tmp_path / "sys/fs/cgroup" / group.rpartition("::/")[2]
    own.mkdir(parents=True)
    (own / "cpu.max").write_text(limit + "\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(group + "\n")
    (tmp_path / "proc/stat").write_text("".join(f"cpu{core} 1 1 1 1 1 1 1 1\n" for core in range(8)))
    assert threads.free_cores(tmp_path) == (free or 8.0)


@has_affinity
def test_a_system_without_such_files_has_all_its_cores(tmp_path):
    assert threads.free_cores(tmp_path) == len(os.sched_getaffinity(0))


def test_omp_num_threads_wins(monkeypatch):
    chosen, asked = [], []
    monkeypatch.setattr(threads, "choose_threads", lambda *given: asked.append(given) or 5)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    model = GPT(GPTConfig(11, 1, 2, 1, 4, 8, 8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads.set_threads(model)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert (chosen, asked) == ([5], [(weights, torch.get_num_threads())])
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    threads.set_threads(model)
    assert chosen == [5]


def test_the_commands_choose_for_their_model(called, monkeypatch):
    told = []
    monkeypatch.setattr(command_line, "set_threads", told.append)
    assert called(command_line.main, "generate", "x", "--tokens", 1)[0] == 0
    (model,) = told
    assert model.config == load_model(shipped_checkpoint()).config
    assert sum(parameter.numel() for parameter in model.parameters()) < threads.SMALL < LARGE
