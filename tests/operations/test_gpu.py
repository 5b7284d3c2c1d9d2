"""Only a GPU: offsets past 2**31, races, graphs, and the shape that the kernels are made for.

The reference in float64, on the same GPU, takes the oracle's place: the oracle's loops would take hours here, and on
small shapes the two agree.
"""

import gc
from importlib import import_module
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import oracle
from backends import TRITON
from judging import all_results, assert_all_same_bits
from resa import reference
from resa.reference import ReSAConfig
from strategies import DEVICE, INF, NAN, Case
from tolerances import assert_same_bits, assert_three_way, assert_within, eps, lse_floor, plain_attention

only = "compiled kernels only: set RESA_TEST_DEVICE=cuda where there is a GPU"
pytestmark = [pytest.mark.fast, pytest.mark.skipif(DEVICE != "cuda", reason=only)]

# Nine sequences of 2**28 numbers: the last begins at 2**31, so that an offset of 32 bits would wrap around.
HUGE_BATCH, HUGE_LENGTH, HUGE_HEADS, HUGE_DIM, HUGE_BLOCK = 9, 262_144, 8, 128, 16
HUGE_MEMORY = 32 * 2**30  # bytes: keys and values take 10 GB, the largest bounds 5, the reference in float64 the rest
LAST = slice(HUGE_BATCH - 1, HUGE_BATCH)
# The target: 28 query heads over 4 KV heads of 128 channels, blocks of 16, 16K tokens.
HEADS, KV_HEADS, HEAD_DIM, BLOCK, LENGTH = 28, 4, 128, 16, 16_384


@pytest.fixture(scope="module")
def ops():
    """The public Triton operations, for tensors that lie on the GPU already."""
    return import_module("resa.fast")


@pytest.fixture(params=["hopper", "portable"])
def rendering(request, monkeypatch):
    """Both renderings of dense attention, where the GPU has both; the one asked for must have run."""
    hopper = import_module("resa.fast.gpu.hopper")
    if request.param == "portable":
        monkeypatch.setattr(hopper, "suits", lambda *_: False)
    elif torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    with mock.patch.object(hopper, "attend", wraps=hopper.attend) as attend:
        yield request.param
    assert attend.called == (request.param == "hopper")


def normal(*shape, seed, dtype=torch.float16):
    """Standard normal numbers, drawn on the CPU so that they are the same everywhere."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def judge(found, query, keys, values, visible, attend, what):
    """The three-way criterion for finite keys and values and queries [B, Hq, Q, D]; `attend` is the reference's."""
    (out, lse), dtype, group = found, query.dtype, query.shape[1] // keys.shape[1]
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    query64, keys64, values64 = (tensor.double() for tensor in (query, keys, values))
    exact, exact_lse = attend(query64, keys64, values64)
    unit, _ = attend(query64, keys64, values64.abs())
    plain = plain_attention(query, keys, values, visible)
    assert_three_way(out.cpu(), exact.cpu().numpy(), plain.cpu(), 2 * eps(dtype) * unit.cpu().numpy(), f"{what}: out")
    # L of tolerances.py, at most: Σ_d |q_d k_jd| ≤ L for every j, so that L · (D + 4) roundings are more than allowed
    # for; √D is what they come to.
    largest = keys64.abs().amax(dim=2).repeat_interleave(group, dim=1)  # [B, Hq, D]
    L = (query64.abs() * largest[:, :, None]).sum(dim=-1).cpu().numpy() * query.shape[-1] ** -0.5
    exact_lse = exact_lse.cpu().numpy()
    allowed = lse_floor(dtype, L, query.shape[-1] ** 0.5, keys.shape[2] ** 0.5, exact_lse, base=2)
    assert_within(lse.cpu(), exact_lse, allowed, f"{what}: lse")


def check_sparse(ops, query, keys, values, indices, lengths, what, rows=slice(None)):
    """Sparse attention over all sequences; `rows` names those that are looked at."""
    found = ops.sparse_attention(query, keys, values, indices, lengths, BLOCK, return_lse=True)
    found = [each[rows][:, :, None] for each in found]
    query, keys, values, indices, lengths = (each[rows] for each in (query, keys, values, indices, lengths))
    n_blocks = -(-keys.shape[2] // BLOCK)
    chosen = torch.zeros(*indices.shape[:2], n_blocks + 1, dtype=torch.bool, device=DEVICE)
    chosen.scatter_(2, indices.long() + 1, True)  # block -1 in front
    visible = chosen[..., 1:].repeat_interleave(BLOCK, dim=2)[..., : keys.shape[2]]
    visible &= torch.arange(keys.shape[2], device=DEVICE) < lengths[:, None, None]
    visible = visible.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)[:, :, None]

    def attend(query, keys, values):
        result = reference.sparse_attention(query[:, :, 0], keys, values, indices, lengths, BLOCK, return_lse=True)
        return [each[:, :, None] for each in result]

    judge(found, query[:, :, None], keys, values, visible, attend, what)


def check_dense(ops, query, keys, values, lengths, query_lengths, what, rows=slice(None)):
    found = ops.dense_attention(query, keys, values, lengths, query_lengths=query_lengths, return_lse=True)
    found = [each[rows] for each in found]
    query, keys, values, lengths, used = (each[rows] for each in (query, keys, values, lengths, query_lengths))
    row, position = (torch.arange(each.shape[2], device=DEVICE) for each in (query, keys))
    visible = (position <= (lengths - used).view(-1, 1, 1, 1) + row[:, None]) & (row[:, None] < used.view(-1, 1, 1, 1))

    def attend(query, keys, values):
        return reference.dense_attention(query, keys, values, lengths, query_lengths=used, return_lse=True)

    judge(found, query, keys, values, visible, attend, what)


def check_scores(scores, query, bounds, lengths, block_size):
    """Scores within the floor of tolerances.py of the reference's in float64."""
    exact = reference.score_blocks(query.double(), bounds.double(), lengths, block_size)
    group = query.shape[1] // bounds.shape[1]
    terms = query.double().abs().unflatten(1, (-1, group)).mean(dim=2)[..., None]  # [B, Hkv, D, 1]
    largest = bounds.double().nan_to_num(posinf=0.0, neginf=0.0).abs().amax(dim=2)  # [B, Hkv, D, M]
    allowed = eps(torch.float32) * (group + query.shape[-1] + 2) * (terms * largest).sum(dim=2)
    assert_within(scores.cpu(), exact.cpu().numpy(), allowed.cpu().numpy(), "scores")


# --- Offsets of 64 bits ---


@pytest.fixture(scope="module")
def huge():
    """Keys and values of more than 2**31 numbers each; all NaN but for the last sequence."""
    free, _ = torch.cuda.mem_get_info()
    if free < HUGE_MEMORY:
        pytest.skip(f"needs {HUGE_MEMORY / 1e9:.0f} GB of GPU memory, {free / 1e9:.0f} are free")
    shape = (HUGE_BATCH, HUGE_HEADS, HUGE_LENGTH, HUGE_DIM)
    stored = [torch.full(shape, NAN, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    for seed, tensor in enumerate(stored):
        tensor[-1] = normal(*shape[1:], seed=seed)
    yield SimpleNamespace(keys=stored[0], values=stored[1])
    stored.clear()
    torch.cuda.empty_cache()


def only_last(value, other=0):
    """`value` for the last sequence, `other` for those before it."""
    return int32(*[other] * (HUGE_BATCH - 1), value)


def test_bounds_of_the_last_sequence_of_a_huge_cache(ops, huge):
    length = HUGE_LENGTH - 3
    bounds = ops.block_bounds(huge.keys, only_last(length), HUGE_BLOCK)
    expected = reference.block_bounds(huge.keys[LAST], int32(length), HUGE_BLOCK)
    assert_same_bits(bounds[LAST] + 0.0, expected + 0.0, "bounds")
    assert (bounds[:-1, :, 0] == INF).all()
    assert (bounds[:-1, :, 1] == -INF).all()


def test_scores_of_the_last_sequence_of_huge_bounds(ops, huge):
    """Four million tokens, so that the bounds, too, are more than 2**31 numbers."""
    n_blocks = HUGE_LENGTH // 2
    shape = (HUGE_BATCH, HUGE_HEADS, 2, HUGE_DIM, n_blocks)
    bounds = torch.full(shape, NAN, dtype=torch.float16, device=DEVICE)
    middle, half = (normal(HUGE_HEADS, HUGE_DIM, n_blocks, seed=seed) for seed in (2, 3))
    bounds[-1, :, 0], bounds[-1, :, 1] = middle - half.abs(), middle + half.abs()
    query, lengths = normal(HUGE_BATCH, 3 * HUGE_HEADS, HUGE_DIM, seed=4), only_last(8 * n_blocks - 5)
    scores = ops.score_blocks(query, bounds, lengths, 8)
    check_scores(scores[LAST], query[LAST], bounds[LAST], lengths[LAST], 8)
    assert (scores[:-1] == -INF).all()


def test_attention_in_the_last_sequence_of_a_huge_cache(ops, huge, rendering):
    length, n_blocks = HUGE_LENGTH - 3, HUGE_LENGTH // HUGE_BLOCK
    order = torch.rand(HUGE_HEADS, n_blocks, generator=torch.Generator().manual_seed(5)).argsort(dim=-1)
    chosen = torch.cat([order[:, : n_blocks // 10], torch.full((HUGE_HEADS, 1), n_blocks - 1)], dim=1)
    chosen[:, :-1].masked_fill_(chosen[:, :-1] == n_blocks - 1, -1)  # the last block once
    indices = torch.zeros(HUGE_BATCH, *chosen.shape, dtype=torch.int32, device=DEVICE)
    indices[-1] = chosen
    window = normal(HUGE_BATCH, 3 * HUGE_HEADS, 6, HUGE_DIM, seed=6)  # 18 rows per KV head
    check_sparse(ops, window[:, :, 0], huge.keys, huge.values, indices, only_last(length), "huge", LAST)
    check_dense(ops, window, huge.keys, huge.values, only_last(length), only_last(4, other=6), "huge", LAST)


def test_a_window_into_the_last_sequence_of_a_huge_cache(huge):
    width, start = 21, HUGE_LENGTH - 24
    new = [normal(HUGE_BATCH, HUGE_HEADS, width, HUGE_DIM, seed=seed) for seed in (8, 9)]
    expected = [stored[LAST].clone() for stored in (huge.keys, huge.values)]
    for tensor, fresh in zip(expected, new, strict=True):
        tensor[:, :, start : start + width] = fresh[LAST]
    shape = (HUGE_BATCH, HUGE_HEADS, 2, HUGE_DIM, HUGE_LENGTH // HUGE_BLOCK)
    bounds = torch.full(shape, 77.0, dtype=torch.float16, device=DEVICE)
    ends = only_last(start + width, other=3)
    write_window = import_module("resa.fast.cache").write_window
    write_window(huge.keys, huge.values, bounds, *new, only_last(start, other=3), ends, HUGE_BLOCK)
    for stored, wanted in zip((huge.keys, huge.values), expected, strict=True):
        assert_same_bits(stored[LAST], wanted, "stored")
        assert all(sequence.isnan().all() for sequence in stored[:-1])
    touched = start // HUGE_BLOCK
    rebuilt = reference.block_bounds(huge.keys[LAST], ends[LAST], HUGE_BLOCK)
    assert_same_bits(bounds[LAST, ..., touched:] + 0.0, rebuilt[..., touched:] + 0.0, "bounds")
    assert (bounds[LAST, ..., :touched] == 77.0).all()
    assert (bounds[:-1] == 77.0).all()


# --- The target shape ---


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_target_shape_agrees_three_ways(ops, dtype, scale):
    """Logits of one unit, where all tokens matter, and of sixteen, where few do."""
    batch, n_queries, lengths = 2, 32, int32(LENGTH, LENGTH - 1000 - 5)
    keys, values = (normal(batch, KV_HEADS, LENGTH, HEAD_DIM, seed=seed, dtype=dtype) for seed in (10, 11))
    keys, window = scale * keys, scale * normal(batch, HEADS, n_queries, HEAD_DIM, seed=12, dtype=dtype)
    query, bounds = window[:, :, -1], ops.block_bounds(keys, lengths, BLOCK)
    assert_same_bits(bounds + 0.0, reference.block_bounds(keys, lengths, BLOCK) + 0.0, "bounds")
    scores = ops.score_blocks(query, bounds, lengths, BLOCK)
    check_scores(scores, query, bounds, lengths, BLOCK)
    config = {"block_size": BLOCK, "active_ratio": 0.1, "min_blocks": 16, "local_blocks": 1}
    indices = ops.select_blocks(scores, lengths, ReSAConfig(**config))
    expected = torch.from_numpy(oracle.select_blocks(scores.tolist(), lengths.tolist(), config))
    assert torch.equal(indices.cpu()[..., : expected.shape[2]], expected)
    assert (indices[..., expected.shape[2] :] == -1).all()
    check_sparse(ops, query, keys, values, indices, lengths, "selected")
    every_block = torch.arange(LENGTH // BLOCK, dtype=torch.int32, device=DEVICE).expand(batch, KV_HEADS, -1)
    check_sparse(ops, query, keys, values, every_block, lengths, "all blocks")
    for used in ((n_queries, n_queries), (1, 17)):
        check_dense(ops, window, keys, values, lengths, int32(*used), f"window of {used}")


@pytest.mark.parametrize("dtype", TRITON.dtypes, ids=str)
def test_compiled_runs_repeat_bit_for_bit(dtype):
    """Splits that arrive in any order are merged in one: 100 runs, of lengths that give each sequence its own share."""
    group, lengths, used = HEADS // KV_HEADS, (LENGTH, 1, LENGTH // 3, 0), int32(2, 1, 2, 2)
    x = Case(13, KV_HEADS, group, HEAD_DIM, BLOCK, lengths, capacity=LENGTH).build(dtype)
    x = x.but(**{name: getattr(x, name).to(DEVICE) for name in ("query", "keys", "values", "lengths")})
    config = ReSAConfig(block_size=BLOCK, active_ratio=0.3)
    first = all_results(TRITON, x, config, used)
    for _ in range(100):
        assert_all_same_bits(all_results(TRITON, x, config, used), first, "rerun")


def test_one_set_of_split_counters_serves_every_launch(rendering):
    """Sparse and dense kernels in turn, captured once like a decode loop's step, replayed into outputs of NaN."""
    attention, capture = import_module("resa.fast.attention"), import_module("resa.fast.gpu.graphs").capture
    lengths, used = int32(LENGTH, 1, LENGTH // 3, 0), int32(32, 1, 20, 0)
    keys, values = (normal(4, KV_HEADS, LENGTH, HEAD_DIM, seed=seed) for seed in (16, 17))
    window, n_blocks = normal(4, HEADS, 32, HEAD_DIM, seed=18), LENGTH // BLOCK
    query, counts = window[:, :, 0].contiguous(), int32(n_blocks, 1, n_blocks // 3 + 1, 0)
    indices = torch.arange(n_blocks, dtype=torch.int32, device=DEVICE).repeat(4, KV_HEADS, 1)
    needed = attention.count_split_counters(keys, HEADS // KV_HEADS, 32)
    shared = {"return_lse": True, "split_counters": torch.zeros(needed, dtype=torch.int32, device=DEVICE)}
    found = []

    def run():
        found[:] = [
            *attention.sparse_attention(query, keys, values, indices, lengths, BLOCK, counts=counts, **shared),
            *attention.dense_attention(window, keys, values, lengths, query_lengths=used, **shared),
        ]

    run()
    expected, graph = list(found), capture(run)
    for _ in range(100):
        for tensor in found:
            tensor.fill_(NAN)
        graph.replay()
        assert not shared["split_counters"].any()
        assert_all_same_bits(found, expected, "replayed")


# --- The kernel for Hopper ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("head_dim", "group", "width"), [(128, 7, 32), (128, 1, 65), (128, 16, 40), (64, 8, 32), (64, 3, 32), (64, 16, 65)]
)
def test_windows_of_both_renderings(ops, rendering, monkeypatch, dtype, head_dim, group, width):
    """One to many programs' rows; splits with much, one and no tile; what lies past the end is never seen.

    The last tiles of the first sequence and of the last reach into the next one and past the cache.
    """
    lengths, used = int32(3000, 0, width, 1030, 700, 3, 2990), int32(width, 5, width, 1, 0, width, width)
    keys, values = (normal(7, 2, 3000, head_dim, seed=seed, dtype=dtype) for seed in (20, 21))
    window = 2 * normal(7, 2 * group, width, head_dim, seed=22, dtype=dtype)
    poisoned = [keys.clone(), values.clone()]
    for tensor in poisoned:
        for s, length in enumerate(lengths.tolist()):
            tensor[s, :, length:] = NAN
    for splits in (None, 1, 2, 5, 40):
        if splits is not None:
            monkeypatch.setattr("resa.fast.attention.count_splits", lambda *_, splits=splits: splits)
            monkeypatch.setattr("resa.fast.attention.count_wave_splits", lambda *_, splits=splits: splits)
        check_dense(ops, window, keys, values, lengths, used, f"{splits} splits")
        runs = [
            ops.dense_attention(window, *cache, lengths, query_lengths=used, return_lse=True)
            for cache in ((keys, values), poisoned, poisoned)
        ]
        assert_all_same_bits(runs[1], runs[0], "garbage past the end")
        assert_all_same_bits(runs[2], runs[1], "rerun")


@pytest.mark.parametrize("scale", [1e2, 3e4])
def test_huge_logits_of_both_renderings(ops, rendering, scale):
    """Logits of up to 1e11, whose log-sum-exp has no digits left for a count: equal ones still share the weight.

    And no other gets any, so that one that looks a token ahead is seen.
    """
    keys, values = (normal(1, 1, 1024, 128, seed=seed).clamp(-1, 1) for seed in (23, 24))
    keys = (keys.sign() * scale).half()
    keys[:, :, 100] = keys[:, :, 900] = keys[:, :, 1000]
    window = (keys[:, :, 1000:1001].sign() * scale).expand(1, 7, 32, 128).contiguous()
    window[:, :, 0] = 0  # sees everything alike
    out, lse = ops.dense_attention(window, keys, values, int32(1024), return_lse=True)
    seen = {0: range(993), **dict.fromkeys(range(1, 8), (100, 900)), **dict.fromkeys(range(8, 32), (100, 900, 1000))}
    means = torch.stack([values[0, 0, list(tokens)].double().mean(dim=0) for tokens in seen.values()])
    assert_within(out[0].cpu(), means.expand(7, -1, -1).cpu().numpy(), 1e-3, "equal logits")
    assert lse.isfinite().all()


@pytest.mark.parametrize("batch", [1, 3, 48])
def test_from_one_program_to_many_waves(ops, batch):
    """One sequence is shared by every multiprocessor; 48 times 4 KV heads are more than there are."""
    length = 4096 + 7
    lengths = int32(*(1 + (length - 1) * (s + 1) // batch for s in range(batch)))
    keys, values = (normal(batch, KV_HEADS, length, HEAD_DIM, seed=seed) for seed in (1, 2))
    window = normal(batch, HEADS, 8, HEAD_DIM, seed=3)
    check_dense(ops, window, keys, values, lengths, torch.full_like(lengths, 8), f"batch {batch}")
    indices = torch.arange(-(-length // BLOCK), dtype=torch.int32, device=DEVICE).expand(batch, KV_HEADS, -1)
    check_sparse(ops, window[:, :, 0], keys, values, indices, lengths, f"batch {batch}")


def test_the_references_selection_knows_one_zero_on_a_gpu():
    """A GPU sorts by bits, which tell -0.0 and 0.0 apart; the CPU's sort does not."""
    config = ReSAConfig(block_size=8, active_ratio=0.01, min_blocks=3)
    scores = torch.tensor([[[-0.0, 0.0, -0.0, 0.0, 0.0], [0.0, -0.0, 0.0, -0.0, 0.0]]], device=DEVICE)
    assert reference.select_blocks(scores, int32(40), config).tolist() == [[[0, 1, 4], [0, 1, 4]]]


def test_garbage_that_holds_a_graph_does_not_break_a_capture():
    """An error leaves some behind: a traceback's frames hold a decode loop and its graphs, in a cycle."""
    capture, x = import_module("resa.fast.gpu.graphs").capture, torch.zeros(1, device=DEVICE)
    x.add_(1)  # loads its kernel

    def work():
        kept = [[] for _ in range(10_000)]  # the collector wakes up after so many objects
        x.add_(len(kept))

    gc.collect()
    garbage = [capture(lambda: x.add_(1))]
    garbage.append(garbage)
    del garbage
    graph = capture(work)
    x.zero_()
    graph.replay()
    assert x.item() == 10_000
    assert gc.isenabled()


def test_causal_attention_in_float32_keeps_no_scores():
    """With 16,384 tokens one head's scores are a GiB; asked for groups in float32, torch keeps all of them."""
    causal_attention = import_module("resa.reference.model").causal_attention
    query, key = (torch.randn(1, heads, 16_384, 64, device=DEVICE) for heads in (4, 2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = causal_attention(0, query, key, key)
    assert torch.cuda.max_memory_allocated() - before < 2**27
    at = 300
    visible = torch.ones(1, 1, 1, at + 1, dtype=torch.bool, device=DEVICE)
    expected = plain_attention(query[:, :, at : at + 1], key[:, :, : at + 1], key[:, :, : at + 1], visible)
    assert (out[:, :, at : at + 1] - expected).abs().max() < 1e-5
