"""ReSA inside the library `transformers`, through its own extension points.

    from resa.reference.weights.extension import rectified

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generate(**inputs, max_new_tokens=256, custom_generate=rectified(active_ratio=0.1))

The model stays that library's own. Nothing is set on it, so that any number of generations may run
side by side: each works on a second tree of modules, which shares weights and hooks. In that tree
the configuration names the attention registered here, "resa". It hands queries, keys and values to
the decode loop of `generate.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from copy import copy

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, GenerationConfig, PreTrainedConfig
from transformers.generation import (
    EosTokenCriteria,
    GenerationMode,
    MaxLengthCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..checks import require
from ..config import ReSAConfig
from ..generate import Generation, generate
from ..model import GPT, Attend
from ..operations import REFERENCE_OPS
from ..sampling import Sampling
from .pretrained import config_from_values

NAME = "resa"
# Inputs that the library adds on its own account. The mask counts; the rest changes no token.
INPUTS = {
    "attention_mask", "position_ids", "use_cache", "cache", "past_key_values", "cache_position",
    "logits_to_keep",
}  # fmt: skip


def rectified(
    *, decode: Callable[..., list[Generation]] = generate, **config: object
) -> Callable[..., Tensor]:
    """Make a decode loop for `model.generate(custom_generate=…)`; the keywords are ReSAConfig's.

    It decodes greedily, or samples with temperature, top_k and top_p; ragged batches are padded on
    the left. `decode` has the signature of `resa.reference.generate` and gets the whole batch at
    once. Errors: ValueError naming what is not supported, before any work.
    """
    resa_config = ReSAConfig(**config)

    def loop(
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: list,
        stopping_criteria: list,
        generation_config: GenerationConfig,
        **inputs: object,  # with the mask: if it were named here, the library would pass it twice
    ) -> Tensor:
        # What is asked for, by value. The library hands neither of these two to a loop of ours.
        caller = inspect.currentframe().f_back.f_locals
        streamer, assistant = caller.get("streamer"), caller.get("assistant_model")
        _check(generation_config, inputs, assistant)
        longest, ends = _limits(stopping_criteria)
        sampling = _sampling(logits_processor, generation_config.do_sample)

        # The prompts are what the mask leaves of the rows.
        mask, places = inputs.get("attention_mask"), inputs.get("position_ids")
        is_real = (torch.ones_like(input_ids) if mask is None else mask).bool()
        if places is not None:
            counted = (is_real.long().cumsum(dim=1) - 1)[is_real]
            is_counted = torch.equal(places.expand_as(input_ids)[is_real].long(), counted)
            allowed = "the tokens' places, which need not be given"
            require(is_counted, "position_ids", "others", allowed)
        prompts = [row[real].tolist() for row, real in zip(input_ids, is_real, strict=True)]
        is_one, given = streamer is None or len(prompts) == 1, f"one for {len(prompts)} prompts"
        require(is_one, "streamer", given, "one for a single prompt")

        def stream(sequence: int, position: int, token: int) -> None:
            streamer.put(torch.tensor([token], device="cpu"))

        # Decode. Seeds drawn here make torch.manual_seed decide what is sampled.
        guest = Guest(model)
        seeds = torch.randint(2**62, (len(prompts),), device="cpu").tolist()
        generations = decode(
            guest,
            prompts,
            max(longest - input_ids.shape[1], 1),  # the library, too, looks after each token
            resa_config,
            sampling,
            generators=[torch.Generator().manual_seed(seed) for seed in seeds],
            stop_tokens=ends,
            on_token=None if streamer is None else stream,
        )
        if streamer is not None:
            streamer.end()

        # Pad the rows to one length, as the library does.
        pad = generation_config.pad_token_id
        pad = pad if pad is not None else ends[0] if ends else 0
        rows = [generation.tokens for generation in generations]
        width = max(map(len, rows))
        padded = [tokens + [pad] * (width - len(tokens)) for tokens in rows]
        return torch.cat((input_ids, input_ids.new_tensor(padded)), dim=1)

    return loop


class Guest(GPT):
    """A `transformers` model in the place of a `GPT`: its own layers around our attention."""

    def __init__(self, theirs: nn.Module) -> None:
        nn.Module.__init__(self)  # no weights of our own
        self.config = config_from_values("model.config", theirs.config.to_diff_dict())
        self.ops = REFERENCE_OPS
        _check_model(theirs)
        self.body = second_tree(theirs.base_model)
        self.embed = theirs.get_input_embeddings()
        self.output = theirs.get_output_embeddings()

    def hidden_states(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Final hidden states [B, Q, C], as `GPT.hidden_states` returns them."""
        attended = []

        def noted(layer: int, *heads: Tensor) -> Tensor:
            attended.append(layer)
            return attend(layer, *heads)

        hidden = self.body(
            input_ids=tokens, position_ids=positions, use_cache=False, attend=noted,
            output_attentions=False, output_hidden_states=False,
        ).last_hidden_state  # fmt: skip

        # A layer that somebody replaced may have an attention of its own.
        allowed = f"one of each of the {self.config.n_layer} layers, by layer_idx"
        is_whole = attended == list(range(self.config.n_layer))
        require(is_whole, "model: attention calls", attended, allowed)
        return hidden


def second_tree(module: nn.Module) -> nn.Module:
    """Copy a tree of modules, which shares parameters, buffers and hooks and has our attention."""
    # Without `copy`, which parametrised modules refuse. What is compiled is compiled for the first.
    twin = object.__new__(type(module))
    twin.__dict__.update(vars(module), _compiled_call_impl=None)
    for name, value in vars(module).items():
        if isinstance(value, PreTrainedConfig):
            twin.__dict__[name] = own = copy(value)
            own._attn_implementation = NAME
        elif name in ("_parameters", "_buffers"):
            twin.__dict__[name] = copy(value)
        elif name == "_modules":
            twin.__dict__[name] = {
                key: part if part is None else second_tree(part) for key, part in value.items()
            }
    return twin


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: object,
    attend: Attend | None = None,
    **__: object,
) -> tuple[Tensor, None]:
    """The registered attention: query [B, Hq, Q, D], keys and values → out [B, Q, Hq, D]."""
    given, allowed = "none outside of generate", "model.generate(custom_generate=rectified(…))"
    require(attend is not None, f"attention {NAME!r}", given, allowed)
    return attend(module.layer_idx, query, key, value).transpose(1, 2).contiguous(), None


def _check_model(theirs: nn.Module) -> None:
    """Refuse a model that does more than its body and its head, which are all that is called."""
    allowed = "that of a class of transformers"
    is_known = type(theirs).forward.__module__.startswith("transformers.")
    require(is_known, "model.forward", f"that of {type(theirs).__name__}", allowed)
    is_hooked = bool(theirs._forward_hooks or theirs._forward_pre_hooks)
    require(not is_hooked, "model", "a forward hook", "hooks on its parts")

    # A forward of an instance, such as accelerate's, calls the modules that it was made for.
    for name, module in theirs.named_modules():
        has_attention = any("layer_idx" in vars(part) for part in module.modules())
        is_own = not (has_attention and "forward" in vars(module))
        where = f"model.{name}.forward".replace("..", ".")
        given = "a function set on the instance, as accelerate and torch.compile do"
        require(is_own, where, given, "that of its class")


def _check(
    generation_config: GenerationConfig, inputs: Mapping[str, object], assistant: object
) -> None:
    """Refuse requests that this decode loop does not honour."""
    for name, given in inputs.items():
        is_known, kind = name in INPUTS or given is None, type(given).__name__
        require(is_known, name, kind, "input_ids and attention_mask alone")
        layers, allowed = getattr(given, "layers", ()), "none: generation begins with the prompt"
        is_filled = any(getattr(layer, "is_initialized", False) for layer in layers)
        require(not is_filled, name, "a cache with tokens in it", allowed)

    require(assistant is None, "assistant_model", type(assistant).__name__, "None")
    for name, plain in (
        ("prompt_lookup_num_tokens", (None,)),
        ("num_beams", (None, 1)),
        ("num_return_sequences", (None, 1)),
        ("return_dict_in_generate", (None, False)),
    ):
        given = getattr(generation_config, name, None)
        require(given in plain, name, given, str(plain[-1]))
    mode = generation_config.get_generation_mode()
    is_plain = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    require(is_plain, "generation mode", mode.value, "greedy search or sampling")


def _limits(criteria: list) -> tuple[int, list[int]]:
    """The longest row, prompt included, and the tokens that end one, as all criteria together say.

    The library puts what the caller passes in the place of what the configuration says.
    """
    lengths, ends = [], []
    for each in criteria:
        if type(each) is MaxLengthCriteria:
            lengths.append(each.max_length)
        elif type(each) is EosTokenCriteria:
            ends += each.eos_token_id.tolist()
        else:
            allowed = "MaxLengthCriteria, EosTokenCriteria"
            require(False, "stopping_criteria", type(each).__name__, allowed)
    require(len(lengths) > 0, "stopping_criteria", "no longest length", "a MaxLengthCriteria")
    return min(lengths), ends


def _sampling(processors: list, is_sampled: bool) -> Sampling:
    """Understand the processors of logits, those of the configuration and the caller's own.

    `Sampling` applies temperature, then top-k, then one top-p; any other order means something
    else, and is refused. None of them changes which token is the likeliest.
    """
    temperature, top_k, top_p = 1.0, None, None
    for each in processors:
        name, kind = type(each).__name__, type(each)
        known = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
        allowed = ", ".join(kind.__name__ for kind in known)
        require(kind in known, "logits_processor", name, allowed)
        if kind is not TemperatureLogitsWarper:
            value, allowed = each.filter_value, "-inf"
            require(
                value == float("-inf"), f"logits_processor: {name}.filter_value", value, allowed
            )
        if not is_sampled:
            continue
        given, allowed = f"{name} after TopPLogitsWarper", "temperature, then top-k, then top-p"
        require(top_p is None, "logits_processor", given, allowed)
        if kind is TemperatureLogitsWarper:
            temperature *= each.temperature
        elif kind is TopKLogitsWarper:
            top_k = min(each.top_k, each.top_k if top_k is None else top_k)
        else:
            top_p, kept = each.top_p, each.min_tokens_to_keep
            require(kept == 1, f"logits_processor: {name}.min_tokens_to_keep", kept, "1")
    if not is_sampled or top_p == 0:  # no share at all leaves the likeliest
        return Sampling()
    return Sampling(temperature, 1.0 if top_p is None else top_p, top_k)


AttentionInterface.register(NAME, _attention)
