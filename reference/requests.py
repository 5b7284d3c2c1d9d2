"""Before decoding starts: requests are checked, caches opened, random generators handed out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .cache import KVCache
from .checks import check_cache_memory, check_tokens, is_integer, require, require_integer
from .config import ReSAConfig
from .model import GPT
from .operations import Operations
from .sampling import Sampling

if TYPE_CHECKING:
    from .generate import Generation


def check_request(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    config: ReSAConfig,
    sampling: Sampling,
    stop_tokens: Collection[int],
    resume: Generation | None,
    generators: torch.Generator | Sequence[torch.Generator] | None = None,
) -> None:
    """Refuse by name what decoding cannot work with, before any work starts."""
    require(isinstance(config, ReSAConfig), "config", type(config).__name__, "a ReSAConfig")
    require(isinstance(sampling, Sampling), "sampling", type(sampling).__name__, "a Sampling")
    max_new_tokens = require_integer("max_new_tokens", max_new_tokens, 0)
    check_weights(model)
    is_list = isinstance(prompts, Sequence) and not isinstance(prompts, str) and len(prompts) > 0
    require(is_list, "prompts", repr(prompts)[:60], "a non-empty list of token lists")
    held = 0
    if resume is not None:
        parts = ("tokens", "cache", "n_drifted")  # the type itself stands to the right of this file
        is_generation = all(hasattr(resume, part) for part in parts)
        require(is_generation, "resume", type(resume).__name__, "a Generation, or None")
        check_resume(model, config, resume)
        require(len(prompts) == 1, "prompts", f"{len(prompts)} lists", "1, the next turn")
        held = resume.cache.length + (len(resume.tokens) > 0)  # the pending token is fed first

    vocabulary, context = model.config.vocab_size, model.config.context
    may_be_empty = resume is not None and len(resume.tokens) > 0
    for index, prompt in enumerate(prompts):
        name = f"prompts[{index}]"
        is_tokens = isinstance(prompt, Sequence) and not isinstance(prompt, str)
        is_fed = is_tokens and (len(prompt) > 0 or may_be_empty)
        require(is_fed, name, repr(prompt)[:60], "a non-empty list of token ids")
        check_tokens(prompt, vocabulary, name)
        length = held + len(prompt)
        given = f"{length} tokens and max_new_tokens = {max_new_tokens}"
        allowed = f"prompt + max_new_tokens − 1 ≤ context = {context}"
        require(length + max(max_new_tokens - 1, 0) <= context, name, given, allowed)
    is_list = isinstance(stop_tokens, Collection)
    require(is_list, "stop_tokens", stop_tokens, "a list or set of token ids")
    for token in stop_tokens:
        is_known, allowed = is_integer(token, 0) and token < vocabulary, f"0 … {vocabulary - 1}"
        require(is_known, "stop_tokens", repr(token), f"token ids {allowed}")
    check_generators(len(prompts), generators)


def check_weights(model: GPT) -> None:
    """Refuse weights that are not all on one device, and hooks that decoding would never call."""
    weight = getattr(model.embed, "weight", None)
    given, allowed = type(model.embed).__name__, "a module with a weight [V, C]"
    require(isinstance(weight, Tensor), "model.embed", given, allowed)
    devices = sorted({str(each.device) for each in (*model.parameters(), *model.buffers())})
    given = f"device{'s' * (len(devices) > 1)} {', '.join(devices)}"
    is_one = len(devices) == 1 and devices != ["meta"]
    require(is_one, "model", given, "all weights in the memory of one device")

    # Decoding calls a model's parts, but neither the model nor modules that only hold parts.
    for name, module in model.named_modules():
        is_called = name != "" and type(module).forward is not nn.Module.forward
        is_hooked = bool(module._forward_hooks or module._forward_pre_hooks)
        where = f"model.{name}".rstrip(".")
        allowed = "hooks on modules that decoding calls: embeddings, projections, norms, MLPs"
        require(is_called or not is_hooked, where, "a forward hook", allowed)


def check_resume(model: GPT, config: ReSAConfig, resume: Generation) -> None:
    """Refuse a generation that this model and configuration cannot continue."""
    keys, weight, shape = resume.cache.keys, model.embed.weight, model.config
    given = (keys.shape[0], keys.shape[2], keys.shape[4], keys.dtype, keys.device)
    wanted = (shape.n_layer, shape.n_kv_head, shape.head_dim, weight.dtype, weight.device)
    allowed = f"this model's layers, KV heads, head_dim … {wanted}"
    require(given == wanted, "resume", f"a cache of {given}", allowed)
    b = resume.cache.block_size
    require(config.block_size == b, "config.block_size", config.block_size, f"{b}, the cache's")
    w, n = resume.n_drifted, len(resume.tokens)
    require(w == 0 or w < n, "resume.n_drifted", w, f"less than its {n} tokens")


def open_caches(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    config: ReSAConfig,
    resume: Generation | None,
) -> list[tuple[KVCache, list[int]]]:
    """A cache for each prompt, with room for all that is to come, and the tokens to prefill first.

    A generation that is resumed stays as it is: the exact part of its cache is copied. Its open
    window is encoded again, with the pending token and the prompt.
    """
    only = "False: only the Triton path rounds bounds"
    require(not config.eight_bit_bounds, "config.eight_bit_bounds", True, only)
    check_selection(config, model.ops)
    kept, again = 0, []
    if resume is not None:
        kept = resume.cache.length - resume.n_drifted
        again = resume.tokens[-resume.n_drifted - 1 :]
    feeds = [[*again, *prompt] for prompt in prompts]
    room = kept + max(int(max_new_tokens) - 1, 0)  # the last token is never fed
    capacities = [len(feed) + room for feed in feeds]

    # All of them have to fit, not each by itself.
    shape, weight, b = model.config, model.embed.weight, config.block_size
    together = (shape.n_layer, 1, shape.n_kv_head, sum(capacities), shape.head_dim)
    bits = config.kept_bits
    check_cache_memory(together, b, weight.dtype, weight.device, bits)
    caches = [model.new_cache(capacity, b, bits) for capacity in capacities]

    if resume is not None:
        old = zip(resume.cache.keys, resume.cache.values, strict=True)
        for layer, (keys, values) in enumerate(old):
            caches[0].write(layer, 0, keys[:, :, :kept], values[:, :, :kept])
        caches[0].length = kept
    return list(zip(caches, feeds, strict=True))


def check_selection(config: ReSAConfig, ops: Operations) -> None:
    """Refuse sketches where the operations have none."""
    has_it = config.kept_bits is None or ops.score_sketch is not None
    allowed = "'bounds': these operations have no sketches"
    require(has_it, "config.selection", repr(config.selection), allowed)


def check_generators(
    batch: int, generators: torch.Generator | Sequence[torch.Generator] | None
) -> None:
    """Refuse all but a generator per prompt, one in all, or None."""
    if generators is None or isinstance(generators, torch.Generator):
        return
    allowed = "a torch.Generator, one per prompt, or None"
    require(isinstance(generators, Sequence), "generators", generators, allowed)
    are_generators = all(isinstance(each, torch.Generator) for each in generators)
    require(are_generators, "generators", repr(generators)[:60], "torch.Generators")
    count = len(generators)
    require(count == batch, "generators", f"{count} generators", f"one, or {batch}")
    is_own = len({id(each) for each in generators}) == batch
    given, allowed = "the same generator for two prompts", "one for each prompt, or one in all"
    require(is_own, "generators", given, allowed)


def sequence_generators(
    batch: int, sampling: Sampling, generators: torch.Generator | Sequence[torch.Generator] | None
) -> list[torch.Generator | None]:
    """One generator per sequence, so that none draws from another's (law 9).

    generators: one per prompt, or one that seeds them all in prompt order; None is torch's default.
    Call this after every check: it draws the seeds.
    """
    if isinstance(generators, Sequence):
        return list(generators)
    if sampling.temperature == 0:
        return [None] * batch

    # Draw seeds one by one: the seed of prompt i must not depend on how many prompts follow.
    base = torch.default_generator if generators is None else generators
    draw = [torch.randint(2**63 - 1, (), generator=base, device=base.device) for _ in range(batch)]
    return [torch.Generator().manual_seed(int(seed)) for seed in draw]
