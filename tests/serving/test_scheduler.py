"""The scheduler alone, driven at random beside a plain model of what is exact."""

import copy
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from engines import SCHEDULER, save_model
from resa.fast.vllm.scheduler import ReSAScheduler

PAGE = 4
init_none_hash(sha256)
HASHER = get_request_block_hasher(PAGE, sha256)  # pages with equal tokens before and in them are equal


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """An engine's configuration, for schedulers without an engine around them."""
    arguments = EngineArgs(
        str(save_model(tmp_path_factory.mktemp("model"))), dtype="float32", block_size=PAGE, max_model_len=128,
        max_num_seqs=4, max_num_batched_tokens=128, skip_tokenizer_init=True, scheduler_cls=SCHEDULER,
        async_scheduling=False, additional_config={"resa": {"block_size": PAGE}},
    )  # fmt: skip
    return arguments.create_engine_config()


def scheduler_for(config, n_pages: int, resa: dict, budget: int, n_running: int) -> ReSAScheduler:
    config = copy.deepcopy(config)
    config.additional_config = {"resa": resa | {"block_size": PAGE}}
    config.cache_config.num_gpu_blocks = n_pages
    config.scheduler_config.max_num_batched_tokens = budget
    config.scheduler_config.max_num_scheduled_tokens = budget
    config.scheduler_config.max_num_seqs = n_running
    spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=16, dtype=torch.float32)
    pages = KVCacheConfig(num_blocks=n_pages, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    return ReSAScheduler(config, pages, StructuredOutputManager(config), PAGE, log_stats=True)


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


def step(scheduler, plain):
    """Schedule, write, and give every request that has caught up a token that follows from the last ones."""
    output = scheduler.schedule()
    starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    cached = output.scheduled_cached_reqs
    starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    names, sampled = list(output.num_scheduled_tokens), []
    for name in names:
        request, n_tokens = scheduler.requests[name], output.num_scheduled_tokens[name]
        plain.write(request, starts[name], n_tokens)
        caught_up = starts[name] + n_tokens == request.num_tokens
        sampled.append([sum(request.all_token_ids[-3:]) % 3] if caught_up else [])
    plain.check_published()
    result = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled_token_ids=sampled)
    scheduler.update_from_output(output, result)
    plain.check_published()


@given(
    interval=st.sampled_from([None, 1, 2, 3, 8]),
    spread=st.booleans(),
    n_running=st.integers(1, 4),
    n_pages=st.integers(34, 44),
    room=st.integers(0, 12),
    seed=st.integers(0, 2**32),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_published_pages_are_exact_whatever_comes(config, interval, spread, n_running, n_pages, room, seed):
    """Arrivals, stops, aborts, preemption and small budgets at random; prefixes shared, of answers too."""
    chance, resa = random.Random(seed), {"interval": interval, "spread": spread, "min_blocks": 1}
    budget = n_running + (interval or 1) - 1 + room
    scheduler = scheduler_for(config, n_pages, resa, budget, n_running)
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
