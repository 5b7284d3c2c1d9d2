"""The scheduler alone, driven at random beside a plain model of what is exact."""

import copy
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from engines import SCHEDULER, chunks_of, save_model
from resa.fast.vllm.scheduler import ReSAScheduler

PAGE = 4
init_none_hash(sha256)
HASHER = get_request_block_hasher(PAGE, sha256)  # pages with equal tokens before and in them are equal


@pytest.fixture(scope="session")
def new_scheduler(tmp_path_factory):
    """A function that makes schedulers without an engine around them."""
    arguments = EngineArgs(
        str(save_model(tmp_path_factory.mktemp("model"))), dtype="float32", block_size=PAGE, max_model_len=128,
        max_num_seqs=4, max_num_batched_tokens=128, skip_tokenizer_init=True, scheduler_cls=SCHEDULER,
        async_scheduling=False, additional_config={"resa": {"block_size": PAGE}},
    )  # fmt: skip
    engine_config = arguments.create_engine_config()

    def new(n_pages: int, resa: dict, budget: int, n_running: int) -> ReSAScheduler:
        config = copy.deepcopy(engine_config)
        config.additional_config = {"resa": resa | {"block_size": PAGE, "min_blocks": 1}}
        config.cache_config.num_gpu_blocks = n_pages
        config.scheduler_config.max_num_batched_tokens = budget
        config.scheduler_config.max_num_scheduled_tokens = budget
        config.scheduler_config.max_num_seqs = n_running
        spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=16, dtype=torch.float32)
        groups = [KVCacheGroupSpec(["layer"], spec)]
        pages = KVCacheConfig(num_blocks=n_pages, kv_cache_tensors=[], kv_cache_groups=groups)
        return ReSAScheduler(config, pages, StructuredOutputManager(config), PAGE, log_stats=True)

    return new


class Plain:
    """Which token every slot of the cache holds, and whether dense prefill would write the same."""

    def __init__(self, scheduler):
        self.scheduler, self.slots = scheduler, {}

    def write(self, request, start, n_tokens):
        """A step's chunk: exact if it is dense, and all before it is."""
        resa, tokens = self.scheduler.resa, request.all_token_ids
        (pages,) = self.scheduler.kv_cache_manager.get_block_ids(request.request_id)
        slots = [pages[at // PAGE] * PAGE + at % PAGE for at in range(start + n_tokens)]
        before = [self.slots.get(slot) for slot in slots[:start]]
        assert [token for token, _ in before] == tokens[:start], "a cached token is another's"
        left = request.num_tokens - start
        if start >= request.num_prompt_tokens and left <= (resa.config.interval or 1):
            assert n_tokens == left, "a window in parts"
        is_dense = not resa.is_sparse(n_tokens, start, request.num_prompt_tokens)
        is_exact = is_dense and all(exact for _, exact in before)
        if is_dense:
            assert is_exact, "a dense pass over keys that sparse steps wrote"
        for slot, token in zip(slots[start:], tokens[start:], strict=False):
            self.slots[slot] = token, is_exact
        drifted = sum(not self.slots[slot][1] for slot in slots)
        assert resa.config.interval is None or drifted < resa.config.interval, "rectified late"
        assert drifted == request.num_computed_tokens - self.scheduler.exact[request.request_id]

    def check_published(self):
        """Every page that others may find holds exact tokens alone."""
        pool = self.scheduler.kv_cache_manager.block_pool
        for block in pool.blocks:
            if block.block_hash is not None:
                assert all(self.slots[block.block_id * PAGE + i][1] for i in range(PAGE)), "published"


def step(scheduler, plain, waiting=()):
    """Schedule, write, and give every request that has caught up a token that follows from the last ones."""
    output = scheduler.schedule()
    places, sampled = {}, []
    for name, start, end in chunks_of(output):
        request, places[name] = scheduler.requests[name], len(places)
        plain.write(request, start, end - start)
        sampled.append([sum(request.all_token_ids[-3:]) % 3] if end == request.num_tokens else [])
    plain.check_published()
    result = ModelRunnerOutput(list(places), places, sampled_token_ids=sampled)
    scheduler.update_from_output(output, result)
    plain.check_published()
    assert scheduler.exact.keys() == {request.request_id for request in scheduler.running} | {*waiting}
    return output


@given(
    interval=st.sampled_from([8, 3, 2, 1, None]),
    spread=st.booleans(),
    n_running=st.sampled_from([4, 3, 2, 1]),
    n_pages=st.integers(27, 34),
    room=st.sampled_from([0, 1, 12]),  # in the budget; with little of it, windows would be split
    seed=st.integers(0, 2**32),
)
@settings(max_examples=2 * settings.default.max_examples)
# A budget that leaves one token to a request that is computed again after a preemption.
@example(interval=2, spread=False, n_running=4, n_pages=27, room=1, seed=764)
def test_published_pages_are_exact_whatever_comes(new_scheduler, interval, spread, n_running, n_pages, room, seed):
    """Arrivals, stops, aborts, preemption and small budgets at random; prefixes shared, of answers too."""
    chance, budget = random.Random(seed), n_running + max(interval or 2, 2) - 1 + room
    scheduler = new_scheduler(n_pages, {"interval": interval, "spread": spread}, budget, n_running)
    plain, prompts = Plain(scheduler), []
    for _ in range(100):
        if len(prompts) < 12 and chance.random() < 0.3:
            earlier = chance.choice(prompts or [[0]])[: chance.choice([0, 20, 99, 99])]
            prompts.append(earlier + chance.choices(range(3), k=chance.choice([1, 5, 20]) if len(earlier) < 20 else 0))
            limits = {"max_tokens": chance.randint(1, 60), "stop_token_ids": [chance.choice([2, 9, 9])]}
            sampling = SamplingParams(temperature=0, **limits)
            scheduler.add_request(Request(str(len(prompts)), prompts[-1], sampling, None, block_hasher=HASHER))
        elif scheduler.requests and chance.random() < 0.05:
            name = chance.choice(sorted(scheduler.requests))
            scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        step(scheduler, plain)

    # Nothing starves and nothing leaks.
    for _ in range(2000):
        if not scheduler.requests:
            break
        step(scheduler, plain)
    assert not scheduler.requests
    assert not scheduler.exact
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is vLLM's null page


def test_a_session_goes_on_from_where_it_is_exact(new_scheduler):
    """More input comes when five of its tokens have drifted."""
    scheduler = new_scheduler(40, {"interval": 8}, 64, 1)
    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    plain, waiting = Plain(scheduler), ["r"]
    for more in ([0, 1, 2, 0, 1, 2], [1, 1, 2, 0, 2], [2, 0]):
        scheduler.add_request(Request("r", more, sampling, None, block_hasher=HASHER, resumable=True))
        for _ in range(6):
            step(scheduler, plain, waiting)
        request = scheduler.requests["r"]
        assert request.num_computed_tokens - scheduler.exact["r"] == 5
    assert scheduler.exact["r"] == 6 + 5 + 5 + 5 + 2  # kept are the tokens that were fed


def test_the_timeline_of_the_page(new_scheduler):
    """docs/vllm_scheduler.md follows one request: a prompt of 6 tokens, f = 4, pages of 4 tokens."""
    scheduler = new_scheduler(20, {"interval": 4}, 16, 1)
    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    request = Request("r", [0, 1, 2, 0, 1, 2], sampling, None, block_hasher=HASHER)
    scheduler.add_request(request)
    plain, rows = Plain(scheduler), []
    for number in range(1, 10):
        before = request.num_computed_tokens
        ((_, start, end),) = chunks_of(step(scheduler, plain))
        n_shared = sum(block.block_hash is not None for block in scheduler.kv_cache_manager.block_pool.blocks)
        tokens = f"{start} … {end - 1}" if end - start > 1 else f"{start}"
        kind = "dense" if end - start > 1 else "sparse"
        back = f"{start}" if start < before else "–"
        rows.append([f"{number}", f"{before}", back, tokens, kind, f"{end}", f"{scheduler.exact['r']}", f"{n_shared}"])
    page = (Path(__file__).parents[2] / "docs" / "vllm_scheduler.md").read_text(encoding="utf-8")
    written = re.findall(r"^\| (\d+ .*) \|$", page, re.MULTILINE)
    assert [[cell.strip() for cell in row.split("|")] for row in written] == rows
