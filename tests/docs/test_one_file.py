"""docs/examples/resa_in_one_file.py against the reference, on the shipped model that it reads."""

import ast
import base64
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from near_ties import agreement
from resa.examples import resa_in_one_file as one
from resa.reference import ReSAConfig, block_bounds, generate, load_model
from resa.reference.weights.checkpoint import shipped_checkpoint
from resa.reference.weights.tokenizer import load_tokenizer
from small_models import dense_cache

pytestmark = pytest.mark.site
PATH = Path(one.__file__)
CONFIG = ReSAConfig(
    block_size=one.BLOCK_SIZE,
    active_ratio=one.ACTIVE_RATIO,
    min_blocks=one.MIN_BLOCKS,
    local_blocks=one.LOCAL_BLOCKS,
    interval=one.INTERVAL,
)
# 14 blocks and more, of which a step reads 4. The last 7 tokens are not rectified. No choice is so close that rounding
# could decide it: the narrowest is 1.9 of the allowances of near_ties.py.
N_READ, N_DECODED = 220, 31
ROUNDING = 2e-4  # of float32, in keys and values up to 17; a sparse step is off by a thousand times as much


@pytest.fixture(scope="module")
def model():
    return load_model(shipped_checkpoint("carrying"))


@pytest.fixture(scope="module")
def weights():
    return one.load_weights(one.FOLDER / "carrying.safetensors")


@pytest.fixture(scope="module")
def prompt():
    return load_tokenizer().encode_ordinary(one.PROMPT + one.SCRIPT)[:N_READ]


def test_it_is_four_screens_of_numpy():
    source = PATH.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 200
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert "numpy" in imported
    assert imported <= {"numpy", *sys.stdlib_module_names}


def test_it_reads_the_shipped_model(model, weights):
    config = model.config
    assert (config.n_layer, config.n_kv_head, config.head_dim) == (one.N_LAYER, one.N_KV_HEAD, one.HEAD_DIM)
    assert (config.rope_theta, config.norm_eps) == (one.ROPE_THETA, one.NORM_EPS)
    assert not config.qkv_bias
    assert not config.qk_norm
    assert config.tied_embeddings
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(weights[name], parameter.detach().numpy(), err_msg=name)


def test_it_chooses_the_references_tokens(model, weights, prompt):
    """Dense, never rectified, and every 8 tokens: three texts, and each is the reference's."""
    texts = set()
    for interval in (1, None, 8):
        config = ReSAConfig(**{**vars(CONFIG), "interval": interval})
        tokens, _ = one.decode(weights, prompt, [one.BLANK] * N_DECODED, interval)
        (expected,) = generate(model, [prompt], N_DECODED, config)
        assert tokens[:N_READ] == prompt
        assert agreement(model, prompt, tokens[N_READ:], expected.tokens, config) == N_DECODED
        texts.add(tuple(tokens))
    assert len(texts) == 3


def test_a_rectification_makes_its_cache_that_of_a_dense_prefill(model, weights, prompt):
    """Law 6, and law 2 for the bounds, the dense prefill being the reference's."""
    tokens, cache = one.decode(weights, prompt, [one.BLANK] * N_DECODED, one.INTERVAL)
    exact, _ = dense_cache(model, tokens, one.BLOCK_SIZE)

    def errors():
        """Largest difference of each token's keys and values."""
        found = np.stack((cache.keys, cache.values))[..., : len(tokens), :]
        expected = torch.stack((exact.keys[:, 0], exact.values[:, 0])).numpy()
        return abs(found - expected).max(axis=(0, 1, 2, 4))

    n_drifted = N_DECODED % one.INTERVAL
    before = errors()
    assert before[:-n_drifted].max() < ROUNDING
    assert before[-n_drifted:].min() > 100 * ROUNDING
    assert one.wrong_tokens(weights, cache, tokens) == n_drifted

    one.dense_pass(weights, cache, tokens[-n_drifted:], len(tokens) - n_drifted)
    assert errors().max() < ROUNDING
    assert one.wrong_tokens(weights, cache, tokens) == 0
    keys, length = torch.from_numpy(cache.keys), torch.tensor([len(tokens)]).expand(one.N_LAYER)
    rebuilt = block_bounds(keys, length, one.BLOCK_SIZE).numpy()  # [layer, Hkv, 2, D, M]
    np.testing.assert_array_equal(cache.lo, rebuilt[:, :, 0].swapaxes(2, 3))
    np.testing.assert_array_equal(cache.hi, rebuilt[:, :, 1].swapaxes(2, 3))


def test_its_text_is_cut_as_the_tokenizer_cuts_it():
    """One piece is one token, and the question mark is the byte."""
    vocabulary = [
        base64.b64decode(line.split()[0]) for line in (one.FOLDER / "code.tiktoken").read_bytes().splitlines()
    ]
    (pattern,) = re.findall(r're\.findall\(r"(.*?)", text\)', PATH.read_text(encoding="utf-8"))
    for text in (one.PROMPT, one.SCRIPT):
        pieces = re.findall(pattern, text.replace("?", "7"))
        assert [vocabulary.index(piece.encode()) for piece in pieces] == load_tokenizer().encode_ordinary(
            "".join(pieces)
        )
    assert vocabulary[one.BLANK] == b"?"


def test_it_shows_what_sparse_decoding_loses_and_what_a_dense_pass_repairs(tmp_path):
    """The command as the README gives it, from any folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # matrices this small gain nothing from a second thread
    done = subprocess.run(
        [sys.executable, PATH], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    row = r"(\w+) +(\d{16}) +(\d+) digits wrong +(\d+) of (\d+) cached tokens wrong\n"
    ways = {name: rest for name, *rest in re.findall(row, done.stdout)}
    assert list(ways) == ["dense", "sparse", "rectified"]
    assert ways["dense"] == [one.DIGITS, "0", "0", "367"]
    wrong, in_cache, n_cached = (int(number) for number in ways["sparse"][1:])
    assert in_cache == 287  # all that were decoded
    assert int(ways["rectified"][1]) < wrong
    assert int(ways["rectified"][2]) == in_cache % one.INTERVAL
    assert re.search(rf"\nand once more +0 of {n_cached} cached tokens wrong\n", done.stdout)
