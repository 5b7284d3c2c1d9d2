"""The benchmark's own logic, where no clock is needed: what it decodes, checks, counts and writes.

Times are made up here and never kept; on a GPU nothing in this file is timed either.
"""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from resa import reference
from resa.fast import cli
from resa.fast.bench import cli as bench_cli
from resa.reference import Generation, ReSAConfig, checks
from resa.reference import blocks as plain
from small_models import Shape
from strategies import DEVICE

pytestmark = pytest.mark.fast
e2e = pytest.importorskip("resa.fast.bench.e2e", reason="triton comes for Linux only")
layer = pytest.importorskip("resa.fast.bench.layer", reason="triton comes for Linux only")
four_bit = pytest.importorskip("resa.fast.bench.four_bit", reason="triton comes for Linux only")
prefill = pytest.importorskip("resa.fast.bench.prefill", reason="triton comes for Linux only")
model_file = pytest.importorskip("resa.fast.model", reason="triton comes for Linux only")

SMALL = Shape(seed=3, head_dim=16, hidden=32, context=512, tied=False)
CONFIG = ReSAConfig(block_size=8, min_blocks=2, interval=4)
CONTEXT = 80
PLAIN = {"math": SDPBackend.MATH}  # the one that every device has


@pytest.fixture(scope="module")
def model():
    return model_file.FusedGPT(SMALL.model(torch.float32).to(DEVICE))


def own_copy(cache, sequence, length):
    """One sequence of a batch as the reference's cache, cut to `length` tokens, with memory of its own."""
    view = cache.sequence(sequence, length)
    return replace(view, keys=view.keys.clone(), values=view.values.clone(), bounds=view.bounds.clone())


# ---- What is decoded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_shared", [True, False])
def test_caches_are_full_and_shared_where_asked(model, is_shared):
    cache = e2e.new_cache(model, CONFIG, 3, CONTEXT, is_shared=is_shared)
    assert cache.keys.shape == cache.values.shape == (SMALL.layers, 3, SMALL.kv_heads, CONTEXT, SMALL.head_dim)
    assert cache.lengths.tolist() == [CONTEXT] * 3
    for name in ("keys", "values", "bounds"):
        first, second = getattr(cache, name)
        assert (first.data_ptr() == second.data_ptr()) == is_shared
        assert first.std() > 0.5
    for keys, bounds in zip(cache.keys, cache.bounds, strict=True):
        assert torch.equal(plain.block_bounds(keys, cache.lengths, CONFIG.block_size), bounds)


@pytest.mark.parametrize("is_shared", [True, False])
def test_bounds_are_rounded_where_asked(model, is_shared):
    config = replace(CONFIG, eight_bit_bounds=True)
    cache = e2e.new_cache(model, config, 2, CONTEXT, is_shared=is_shared)
    assert len(cache.bounds) == SMALL.layers
    for keys, rounded in zip(cache.keys, cache.bounds, strict=True):
        expected = e2e.compress_bounds(e2e.block_bounds(keys, cache.lengths, CONFIG.block_size))
        assert torch.equal(rounded.codes, expected.codes)
        assert torch.equal(rounded.scale, expected.scale)
    e2e.Cycle(model, cache, config, e2e.GREEDY, f=4)()


@pytest.mark.parametrize("interval", [4, None])
def test_a_cycle_is_the_decode_loop_up_to_the_end_of_the_cache(model, interval):
    """Tokens equal those of the reference's sparse steps and rectifications; every repeat has one length."""
    config, f = replace(CONFIG, interval=interval), 4
    cache = e2e.new_cache(model, config, 2, CONTEXT, is_shared=False)
    plainly = SMALL.model(torch.float32).to(DEVICE)
    expected = [own_copy(cache, s, CONTEXT - f) for s in range(2)]
    cycle = e2e.Cycle(model, cache, config, e2e.GREEDY, f=f)
    fed = cycle.loop.pending.tolist()
    cycle()
    assert cycle.cache.lengths.tolist() == [CONTEXT] * 2
    assert cycle.loop.n_chosen.tolist() == [1 + f] * 2
    assert cycle.passes == [False, False, False, interval is not None]
    for s, own in enumerate(expected):
        generation = Generation([fed[s]], own)
        for _ in range(f):
            logits = reference.decode_step(plainly, generation, config)
            generation.tokens.append(int(logits.argmax()))
        assert cycle.loop.tokens[s, : 1 + f].tolist() == generation.tokens
        assert (cycle.cache.keys[:, s] - own.keys[:, 0]).abs().max() < 1e-4
    cycle()
    assert cycle.cache.lengths.tolist() == [CONTEXT] * 2
    assert cycle.loop.n_chosen.tolist() == [1 + 2 * f] * 2
    assert bool(cycle.loop.running.all())


def test_a_dense_step_overwrites_the_last_position(model):
    """It sees the whole cache, its own token at the end, and what it chooses is the reference's choice."""
    cache = e2e.new_cache(model, CONFIG, 2, CONTEXT, is_shared=False)
    plainly = SMALL.model(torch.float32).to(DEVICE)
    before, expected = cache.keys.clone(), [own_copy(cache, s, CONTEXT - 1) for s in range(2)]
    step = e2e.DenseStep(model, cache, e2e.GREEDY, SDPBackend.MATH)
    fed = step.pending.tolist()
    step()
    assert torch.equal(cache.keys[..., :-1, :], before[..., :-1, :])
    assert not torch.equal(cache.keys[..., -1, :], before[..., -1, :])
    for s, own in enumerate(expected):
        with torch.no_grad():
            hidden = reference.dense_pass(plainly, fed[s : s + 1], own, CONTEXT - 1)
            assert int(plainly.output(hidden[0]).argmax()) == int(step.pending[s])
        assert (own.keys[:, 0] - cache.keys[:, s]).abs().max() < 1e-4


@pytest.fixture
def by_torch(monkeypatch):
    """torch's ways with the one backend that every device has."""
    monkeypatch.setattr(prefill, "WAYS", {"whole": (SDPBackend.MATH, True), "chunks": (SDPBackend.MATH, False)})


@pytest.mark.parametrize("chunk", [7, 16, 40, 64])
def test_torchs_prefill_is_this_projects(model, chunk):
    """In chunks that do and do not divide the prompt: the same next token, the same keys and values."""
    prompt = torch.randint(SMALL.vocab, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    (own, feed), (other, _) = (prefill.open_cache(model, [prompt], 1, CONFIG, None) for _ in range(2))
    chosen = prefill.prefill(model, feed, own, chunk_size=16).argmax(dim=-1)
    tokens = torch.tensor(feed, device=DEVICE)
    found = prefill.TorchPrefill(model, other, tokens, chunk, SDPBackend.MATH)()
    assert torch.equal(found, chosen)
    for name in ("keys", "values"):
        assert getattr(own, name)[..., :40, :].std() > 0.1
        assert (getattr(own, name) - getattr(other, name))[..., :40, :].abs().max() < 1e-4


# ---- What is checked -------------------------------------------------------------------------------------------------


@pytest.fixture
def one_layer(monkeypatch):
    """Makes one layer's cache; its dense peers are the one backend that every device has."""
    monkeypatch.setattr(layer, "BACKENDS", PLAIN)
    shape = layer.Shape(query_heads=6, kv_heads=2, head_dim=16, dtype="float32")
    return lambda config=CONFIG: layer.Layer(shape, config, 2, CONTEXT, 0, DEVICE)


@pytest.mark.parametrize("selection", ["bounds", "sketch"])
def test_every_part_of_a_layer_is_the_references(one_layer, selection):
    made = one_layer(replace(CONFIG, selection=selection))
    errors = made.check()
    parts = {"append", "score", "select", "attend", "rectify", layer.OWN_DENSE, "math"}
    assert set(errors) == parts | {"bounds" if selection == "bounds" else "codes"}
    assert max(errors.values()) < 1e-6
    # The step that a cycle is made of: append, score, select and attend with the indices of now.
    end, b = made.end, CONFIG.block_size
    if selection == "bounds":
        scores = plain.score_blocks(made.query, made.searched, made.plan.completed, b)
    else:
        scores = reference.score_sketch(made.query, made.searched.codes, made.searched.scales, end, b)
    indices = plain.select_blocks(scores, end, CONFIG)
    expected = reference.sparse_attention(made.query, made.keys, made.values, indices, end, b)
    assert layer.distance(made.parts["step"](), expected) < 1e-6


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("write_window", lambda right: lambda *arguments: None, "append"),
        (
            "write_window",
            lambda right: lambda keys, values, bounds, *rest: right(keys, values, bounds + 0, *rest),
            "bounds",
        ),
        ("score_blocks", lambda right: lambda *arguments: 1.01 * right(*arguments), "score"),
        ("select_blocks", lambda right: lambda *arguments, **more: right(*arguments, **more).clamp(max=5), "select"),
        ("sparse_attention", lambda right: lambda *arguments, **more: 1.01 * right(*arguments, **more), "attend"),
        ("dense_attention", lambda right: lambda *arguments, **more: 1.01 * right(*arguments, **more), "rectify"),
        ("torch_dense", lambda right: lambda *arguments: 1.01 * right(*arguments), "math"),
    ],
)
def test_a_wrong_part_is_not_timed(one_layer, monkeypatch, name, wrong, message):
    monkeypatch.setattr(layer, name, wrong(getattr(layer, name)))
    with pytest.raises(ValueError, match=rf"{message}: got error .* before it is timed"):
        one_layer().check()


def test_a_layers_row_has_every_part_and_the_faster_dense_attention(one_layer, monkeypatch):
    """Each part is timed by itself; a cycle's time is per token; a sum counts rectification once in f tokens."""
    times = iter(range(100, 120))

    def time_calls(calls, *, divide_by=1, pause_us=0):
        for call in calls:
            call()
        assert divide_by in (1, CONFIG.interval)
        return layer.Time.of([float(next(times))])

    monkeypatch.setattr(layer, "L2_BYTES", 1)  # one cache is enough
    monkeypatch.setattr(layer, "time_calls", time_calls)
    made = one_layer()
    monkeypatch.setattr(layer, "Layer", lambda *arguments: made)
    shape = layer.Shape(query_heads=6, kv_heads=2, head_dim=16, dtype="float32")
    row = layer.measure(shape, CONFIG, 2, CONTEXT, 1e-6)  # a byte per µs
    timed = {name: time["us"] for name, time in row["parts"].items()}
    assert list(timed) == [
        "append", "score", "select", "attend", "refresh", "score, 8-bit bounds", "dense, this project's kernel",
        "rectify", "rectify, without a pause",
    ]  # fmt: skip
    assert sorted(timed.values()) == list(range(100, 109))
    steps = sum(timed[part] for part in ("append", "score", "select", "attend"))
    assert row["sum_us"] == (3 * steps + timed["rectify"] + timed["refresh"]) / 4
    assert (row["dense_us"], row["resa_us"], row["ratio"]) == (109.0, 110.0, 0.991)
    assert row["cache_bytes"] == row["floor_us"]["rectify"] == 2 * 2 * 2 * CONTEXT * 16 * 4


def test_the_attention_of_a_prompt_is_the_references(model, by_torch, monkeypatch):
    monkeypatch.setattr(prefill, "CHECKED", 12)
    errors = prefill.check(model)
    assert list(errors) == ["resa", "whole", "chunks"]
    assert max(errors.values()) < 1e-6


def masked(mask):
    """Attention by torch under a mask of its own, upper-left or none at all."""
    return lambda backend, *qkv: F.scaled_dot_product_attention(*qkv, **mask, enable_gqa=True)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("causal_attention", masked({"is_causal": True}), "chunks"),
        ("causal_attention", masked({}), "whole"),
        ("dense_attention", lambda *qkv, right=prefill.dense_attention: 1.01 * right(*qkv), "resa"),
    ],
)
def test_a_wrong_attention_of_a_prompt_is_not_timed(model, by_torch, monkeypatch, name, wrong, message):
    monkeypatch.setattr(prefill, "CHECKED", 12)
    monkeypatch.setattr(prefill, name, wrong)
    with pytest.raises(ValueError, match=rf"^{message}: got error .* before it is timed"):
        prefill.check(model)


def test_a_model_in_four_bits_checks_its_matrix_products():
    """Against the rounded weights as they are: a product of other weights is refused."""
    wide = replace(SMALL, hidden=128, kv_heads=2, group=4).config(intermediate_size=128)
    dtype = torch.float32 if DEVICE == "cpu" else torch.float16
    models = [e2e.GPT(wide).requires_grad_(False).to(DEVICE, dtype) for _ in range(2)]
    plain, other = (model_file.FusedGPT(each).fused[0].matmuls() for each in models)
    if DEVICE == "cuda":
        pytest.importorskip("humming", reason="the extra `four-bit` has it")
    rounded = {name: four_bit.FourBitLinear(matmul) for name, matmul in plain.items()}
    e2e.check_four_bits(plain, rounded)
    rounded["down"] = four_bit.FourBitLinear(other["down"])
    with pytest.raises(ValueError, match=r"int4 down: got error .* before it is timed"):
        e2e.check_four_bits(plain, rounded)


# ---- What is counted -------------------------------------------------------------------------------------------------


def test_floors_by_hand(model):
    """2 layers, 3 sequences, 2 KV heads of 16 float32 channels: 768 bytes per token and side, 80 tokens, 10 blocks."""
    dense, sparse = 2 * 768 * 80, 768 * 10 + 2 * 768 * 40
    heads, hidden, inner = SMALL.kv_heads * SMALL.group * 16, SMALL.hidden, SMALL.hidden + 4
    matrices = hidden * (2 * heads + 2 * SMALL.kv_heads * 16) + 3 * hidden * inner
    weights = 4 * (SMALL.layers * matrices + SMALL.vocab * hidden)
    assert e2e.weight_bytes(model) == weights
    found = e2e.floors_us(model, replace(CONFIG, active_ratio=0.5), 3, CONTEXT, 1e-4)  # 0.1 byte per µs
    resa = (3 * sparse + dense) / 4
    read = {"dense": dense, "sparse": sparse, "resa": resa}
    assert found == {name: pytest.approx((weights + n) / 100, abs=0.06) for name, n in read.items()}
    rounded = replace(CONFIG, active_ratio=0.5, eight_bit_bounds=True)
    less = found["sparse"] - e2e.floors_us(model, rounded, 3, CONTEXT, 1e-4)["sparse"]
    assert less == pytest.approx(3 / 4 * 768 * 10 / 100, abs=0.11)  # of the bounds a quarter is left


def test_the_work_beside_attention_has_the_sizes_of_the_model(model):
    """Each product takes its input, and the work between two takes and gives what they do."""
    for work in e2e.layer_work(model, 2, 3):
        work(model.fused[0])


def test_the_largest_batch_leaves_the_reserve(model, monkeypatch):
    """One sequence of 80 tokens: 2·80·16 + 2·16·10 numbers per KV head, 2 heads, 2 layers, 4 bytes: 46,080."""
    each = 2 * 2 * 4 * (2 * 80 * 16 + 2 * 16 * 10)
    assert each == 46_080
    for free, expected in ((each * 3, 3), (each * 3 - 1, 2), (0, 0)):
        monkeypatch.setattr(e2e, "free_memory", lambda device, free=free: free)
        assert e2e.largest_batch(model, CONFIG, CONTEXT) == expected


def test_free_memory_of_a_gpu_leaves_a_reserve(monkeypatch):
    """Memory that the allocator keeps for later is given back first: in pieces it is of no use."""
    free = [0]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(12 * 10**9))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 8 * 10**10))
    assert checks.free_memory(torch.device("cuda")) == 12 * 10**9 - checks.RESERVE
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**6, 8 * 10**10))
    assert checks.free_memory(torch.device("cuda")) == 0


# ---- What is written -------------------------------------------------------------------------------------------------


@pytest.fixture
def untimed(monkeypatch):
    """Everything runs once, and takes as long as the test says: the first cycle 60 µs, the second 50, …; gives the
    cycles in that order."""
    from resa.fast.bench.timing import Time

    def time_calls(calls, *, divide_by=1, pause_us=0):
        for call in calls:
            call()
        return Time.of([9.0])

    cycles = []

    def elapsed(work):
        work()
        if work not in cycles:
            cycles.append(work)
        return 60.0 - 10 * cycles.index(work)

    monkeypatch.setattr(e2e, "elapsed", elapsed)
    monkeypatch.setattr(e2e, "time_calls", time_calls)
    monkeypatch.setattr(e2e, "BACKENDS", {"slow": SDPBackend.MATH, "quick": SDPBackend.MATH})
    monkeypatch.setattr(e2e, "SAMPLES", 1)
    monkeypatch.setattr(e2e, "MIN_SAMPLES", 1)
    return cycles


def test_a_dense_cycle_takes_f_steps():
    taken = torch.zeros(1, device=DEVICE)
    cycle = e2e.DenseCycle(lambda: taken.add_(1), f=5)
    before = taken.item()
    cycle()
    assert taken.item() == before + 5


def test_a_row_compares_with_the_faster_dense_attention(model, untimed):
    """And each way of decoding is the one it says: by its schedule and its bounds."""
    config = replace(CONFIG, interval=2)
    row = e2e.measure(model, config, 2, CONTEXT, 1e-4, is_shared=True)
    assert {name: time["us"] for name, time in row["dense"].items()} == {"slow": 30.0, "quick": 25.0}
    assert row["dense_us"] == 25.0
    assert [row[name]["us"] for name in ("sparse", "resa")] == [20.0, 15.0]
    assert (row["ratio"], row["sparse_ratio"]) == (round(25 / 15, 3), 1.25)
    assert (row["protocol"], row["batch"], row["context"]) == ("shared", 2, CONTEXT)
    slow, quick, sparse, resa = untimed
    assert slow.f == quick.f == sparse.f == resa.f == 2
    assert (sparse.loop.config.interval, resa.loop.config) == (None, config)
    assert (sparse.passes, resa.passes) == ([False, False], [False, True])


@pytest.mark.parametrize("selection", ["bounds", "sketch"])
def test_a_prompts_row_has_times_memory_and_the_estimate_for_all_layers(model, by_torch, monkeypatch, selection):
    """By hand: 2 of 28 layers take 1,000 µs, of which 20 are the output's, so all take 14 · 980 + 20."""
    clock = {"whole": [880.0, 900.0, 920.0], "chunks": [1500.0] * 3, "resa": [1000.0] * 3}
    ways = ("resa", "whole", "chunks")
    order = []

    def elapsed(work):
        order.append(ways[len(order) % 3])
        return clock[order[-1]].pop()

    monkeypatch.setattr(prefill, "ENOUGH_US", 1)
    monkeypatch.setattr(prefill, "elapsed", elapsed)
    monkeypatch.setattr(prefill, "peak_bytes", lambda work: 4 if type(work) is prefill.TorchPrefill else 2)
    monkeypatch.setattr(prefill, "time_calls", lambda calls: [call() for call in calls] and layer.Time.of([20.0]))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    row = prefill.measure(model, replace(CONFIG, selection=selection), CONTEXT, 32)
    assert order == [*ways] * prefill.FEWEST_ROUNDS
    assert (row["context"], row["layers"], row["chunk"]) == (CONTEXT, SMALL.layers, 32)
    assert row["resa"] == {"us": 1000.0, "low": 1000.0, "high": 1000.0}
    assert row["dense"]["whole"] == {"us": 900.0, "low": 890.0, "high": 910.0}
    assert (row["dense_us"], row["ratio"], row["tokens_per_second"]) == (900.0, 0.9, 80_000)
    assert row["peak_bytes"] == {"resa": 2, "whole": 4, "chunks": 4}
    assert row["output_us"] == 20.0
    assert row["all_layers_us"] == {"resa": 14 * 980 + 20, "dense": 14 * 880 + 20}
    # 2 layers, 2 KV heads, room for 128 tokens of 16 float32 channels; 16 blocks of 8 or sketches of 4 bytes and 4.
    searched = 2 * 16 * 16 * 4 if selection == "bounds" else 128 * (4 + 4)
    assert row["cache_bytes"] == 2 * 2 * (2 * 128 * 16 * 4 + searched)


@pytest.mark.parametrize("name", ["whole", "resa"])
def test_what_does_not_fit_is_left_out_unless_it_is_this_projects(model, by_torch, monkeypatch, name):
    def peak_bytes(work):
        if name == ("resa" if type(work) is not prefill.TorchPrefill else "whole" if work.chunk == 20 else "chunks"):
            raise torch.OutOfMemoryError
        return 1

    monkeypatch.setattr(prefill, "elapsed", lambda work: 5e6)
    monkeypatch.setattr(prefill, "peak_bytes", peak_bytes)
    monkeypatch.setattr(prefill, "time_calls", lambda calls: layer.Time.of([20.0]))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    if name == "resa":
        with pytest.raises(torch.OutOfMemoryError):
            prefill.measure(model, CONFIG, 20, 16)
    else:
        row = prefill.measure(model, CONFIG, 20, 16)
        assert list(row["dense"]) == ["chunks"]
        assert row["peak_bytes"] == {"resa": 1, "chunks": 1}


@pytest.fixture
def machine(monkeypatch, model, untimed):
    """A machine of so little memory that one sequence fits, and the small model for the large one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("", (), {"total_memory": 8e10}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(e2e, "free_memory", lambda device: 46_080)
    monkeypatch.setattr(bench_cli, "find_spec", lambda name: name)
    monkeypatch.setattr("resa.fast.bench.timing.copy_bandwidth", lambda: 2.5)
    monkeypatch.setattr(e2e, "build", lambda weights, shape: model)

    def measured(model, config, batch, context, bandwidth, *, is_shared):
        times = {"us": 40.0 * batch, "low": 39.0, "high": 41.0}
        row = {"protocol": "shared" if is_shared else "true", "batch": batch, "context": context, "ratio": 2.5}
        return row | {"sparse": times, "resa": times, "dense_us": 100.0 * batch}

    monkeypatch.setattr(e2e, "measure", measured)


def test_the_command_writes_what_it_measured(machine, monkeypatch, tmp_path, capsys):
    out = tmp_path / "new" / "e2e.json"
    words = (
        "bench e2e --contexts 160 80 --batches 2 1 --true-contexts 80 --intervals 2 --block-size 8 --weights float16"
    )
    monkeypatch.setattr("sys.argv", ["resa", *words.split(), "--out", str(out), "--commit", "abc"])
    assert cli.main() == 0
    result = json.loads(out.read_text())
    points = [(row["weights"], row["protocol"], row["batch"], row["context"]) for row in result["rows"]]
    shared = [("float16", "shared", batch, context) for context in (80, 160) for batch in (1, 2)]
    assert points == [*shared, ("float16", "true", 1, 80)]
    assert result["command"] == f"resa {words}"
    assert result["commit"] == "abc"
    assert result["config"]["interval"] == 2
    assert result["sampling"] == {"temperature": 0.7, "top_p": 0.95, "top_k": None}
    assert set(result["weights"]["float16"]) == {"bytes", "parts"}
    assert set(result["weights"]["float16"]["parts"]) == {"1", "2"}
    shown = capsys.readouterr().out
    assert "float16, 2 × 160 tokens, shared caches, f = 2: dense 200.0 µs, ReSA 80.0 µs, ratio 2.50" in shown
    assert str(out) in shown.replace("\n", "")


def test_the_command_writes_how_long_a_prompt_takes(machine, monkeypatch, tmp_path, capsys):
    """Row by row, shortest prompt first, with the model, the chunk and the configuration that were asked for."""
    out, built, asked = tmp_path / "new" / "prefill.json", [], []

    def measured(model, config, context, chunk):
        asked.append((model, config.selection, context, chunk))
        row = {"context": context, "resa": {"us": 10.0 * context}, "dense_us": 9.0 * context, "ratio": 0.9}
        assert json.loads(out.read_text())["rows"] if context > 80 else not out.exists()
        return row

    monkeypatch.setattr(e2e, "build", lambda *words: built.append(words) or "a model")
    monkeypatch.setattr(prefill, "check", lambda model: {"resa": 1e-4})
    monkeypatch.setattr(prefill, "measure", measured)
    words = "bench prefill --contexts 160 80 --layers 3 --dtype bfloat16 --block-size 8"
    for more, chunk, selection in (("", 8192, "sketch"), (" --chunk 96 --selection bounds", 96, "bounds")):
        monkeypatch.setattr("sys.argv", ["resa", *(words + more).split(), "--out", str(out), "--commit", "abc"])
        assert cli.main() == 0
        result = json.loads(out.read_text())
        assert asked == [("a model", selection, context, chunk) for context in (80, 160)]
        assert [row["context"] for row in result["rows"]] == [80, 160]
        assert (result["command"], result["commit"], result["dtype"]) == (f"resa {words}{more}", "abc", "bfloat16")
        assert (result["config"]["block_size"], result["shape"]["n_layer"]) == (8, 28)
        assert result["errors"] == {"resa": 1e-4}
        assert "160 tokens, 3 layers: dense 1,440.0 µs, ReSA 1,600.0 µs, ratio 0.90" in capsys.readouterr().out
        out.unlink()
        asked.clear()
    assert built == [("bfloat16", replace(e2e.QWEN_7B, n_layer=3))] * 2


BAD = {
    "e2e --intervals 1 4": "--intervals: got 1; allowed: 2 or more",
    "e2e --contexts --true-contexts": "--contexts: got none",
    "e2e --contexts 32": "--contexts: got 32; allowed: > --intervals",
    "e2e --batches 0": "--batches: got 0; allowed: 1 or more",
    "e2e --active-ratio 2": "active_ratio: got 2.0",
    "prefill --contexts": "--contexts: got none; allowed: at least one",
    "prefill --contexts 0 5": "--contexts: got 0; allowed: 1 or more",
    "prefill --contexts 2000000": "--contexts: got 2000000; allowed: ≤ 1,048,576",
    "prefill --layers 0": "--layers: got 0; allowed: 1 … 28",
    "prefill --layers 29": "--layers: got 29; allowed: 1 … 28",
    "prefill --chunk 0": "--chunk: got 0; allowed: 1 or more",
    "prefill --block-size 0": "block_size: got 0",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_arguments_are_named_before_anything_is_built(machine, monkeypatch, capsys, tmp_path, words):
    monkeypatch.setattr(e2e, "build", lambda *words: pytest.fail("something was built"))
    out = tmp_path / "result.json"
    assert cli.main(["bench", *words.split(), "--out", str(out)]) == 2
    shown = capsys.readouterr().err
    assert f"resa bench: {BAD[words]}" in shown
    assert shown.count("\n") == 1
    assert not out.exists()


def test_without_the_library_for_four_bits_it_says_so_at_once(machine, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_cli, "find_spec", lambda name: None)
    monkeypatch.setattr(e2e, "build", lambda weights: pytest.fail("something was built"))
    assert cli.main(["bench", "e2e", "--out", str(tmp_path / "e2e.json")]) == 2
    assert (
        "--weights: got int4, without humming-kernels; allowed: pip install humming-kernels" in capsys.readouterr().err
    )


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for what in ("layer", "e2e", "prefill"):
        assert cli.main(["bench", what]) == 2
        assert capsys.readouterr().err == "resa bench: device: got no NVIDIA GPU; allowed: a machine with one\n"
