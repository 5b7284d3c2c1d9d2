"""A server over HTTP, with two ranks: eight clients at once, one of which hangs up."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from engines import SCHEDULER, expected, prompts_of, save_model, save_tokenizer

RESA = {"interval": 8, "active_ratio": 0.2, "min_blocks": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tokenizer(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):
    """A running server's address; started as docs/serving.md says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "model": folder, "served-model-name": "tiny", "port": port, "host": "127.0.0.1", "dtype": "float32",
        "block-size": 16, "max-model-len": 1024, "max-num-seqs": 8, "max-num-batched-tokens": 256,
        "num-gpu-blocks-override": 520,
        "tensor-parallel-size": 2, "scheduler-cls": SCHEDULER, "additional-config": json.dumps({"resa": RESA}),
    }  # fmt: skip
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags, "--enforce-eager"]
    own = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "TRITON_INTERPRET")
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    log = tmp_path_factory.mktemp("log") / "server.txt"
    with log.open("w") as output:
        # A session of its own: the server's processes, and nobody else's, can be ended together.
        settings = {"stdout": output, "stderr": output, "env": inherited, "start_new_session": True}
        server = subprocess.Popen([*command, "--no-async-scheduling"], **settings)
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert server.poll() is None, log.read_text()[-5000:]
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
        assert "Rectified sparse attention is on" in log.read_text()
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def complete(address, prompt, n_tokens, *, stop_after=None):
    """Ask for a completion, as a stream → its tokens, or the first of them before hanging up."""
    asked = {
        "model": "tiny", "prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "stream": True,
        "ignore_eos": True, "skip_special_tokens": False,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    text = ""
    with urllib.request.urlopen(request, timeout=200) as lines:
        for line in lines:
            if line.startswith(b"data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
                if stop_after is not None and len(text.split()) >= stop_after:
                    break
    return [int(word) for word in text.split()]


def counters(address):
    """Numbers of vLLM's /metrics by name, summed over their labels."""
    found = {}
    for line in urllib.request.urlopen(f"{address}/metrics", timeout=10).read().decode().splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            found[name] = found.get(name, 0) + float(value)
    return found


def test_eight_clients_at_once(folder, address):
    requests = [(prompt, 40 + i) for i, prompt in enumerate(prompts_of((150, 33, 300, 64, 200, 90, 17, 120)))]
    before = counters(address)
    with ThreadPoolExecutor(9) as clients:
        gone = clients.submit(complete, address, prompts_of((80,), seed=3)[0], 400, stop_after=13)
        found = list(clients.map(lambda request: complete(address, *request), requests))
        assert len(gone.result()) >= 13
    assert found == [expected(folder, *request, RESA) for request in requests]

    # It says what it did, and who hung up is gone.
    after = counters(address)
    each = {name: after[f"resa:{name}_total"] - before.get(f"resa:{name}_total", 0) for name in
            ("sparse_steps", "rectifications", "blocks_read", "blocks_held")}  # fmt: skip
    n_tokens = sum(n for _, n in requests)
    assert 0.8 * n_tokens < each["sparse_steps"] + each["rectifications"]
    assert each["rectifications"] >= sum(n // 8 - 1 for _, n in requests)
    assert 0 < each["blocks_read"] < each["blocks_held"]
    for _ in range(50):
        if counters(address)["vllm:num_requests_running"] == 0:
            break
        time.sleep(0.2)
    assert counters(address)["vllm:num_requests_running"] == 0
