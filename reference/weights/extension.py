"""ReSA inside the library `transformers`, through its own extension points.

    from resa.reference.weights.extension import rectified

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generate(**inputs, max_new_tokens=256, custom_generate=rectified(active_ratio=0.1))

The model stays that library's own, and no weight is copied. Its layers hand their queries, keys and
values to an attention registered here under the name "resa". That passes them on to the decode loop
of `generate.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..checks import require
from ..config import ReSAConfig
from ..generate import Generation, generate
from ..model import GPT, Attend
from ..operations import REFERENCE_OPS
from ..sampling import Sampling
from .pretrained import config_from_values

NAME = "resa"
# Requests of the library that this decode loop honours.
PROCESSORS = {"TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper"}
CRITERIA = {"MaxLengthCriteria", "EosTokenCriteria"}
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
        generation_config: object,
        **inputs: object,  # with the mask: if it were named here, the library would pass it twice
    ) -> Tensor:
        # The prompts are what the mask leaves of the rows.
        _check(generation_config, logits_processor, stopping_criteria, inputs)
        mask, places = inputs.get("attention_mask"), inputs.get("position_ids")
        is_real = (torch.ones_like(input_ids) if mask is None else mask).bool()
        if places is not None:
            counted = (is_real.long().cumsum(dim=1) - 1)[is_real]
            is_counted = torch.equal(places.expand_as(input_ids)[is_real].long(), counted)
            allowed = "the tokens' places, which need not be given"
            require(is_counted, "position_ids", "others", allowed)
        prompts = [row[real].tolist() for row, real in zip(input_ids, is_real, strict=True)]

        # Decode. Seeds drawn here make torch.manual_seed decide what is sampled.
        ends = generation_config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        asked, sampling = generation_config, Sampling()
        if asked.do_sample:
            temperature, top_p = asked.temperature or 1.0, asked.top_p or 1.0
            sampling = Sampling(temperature, top_p, asked.top_k or None)
        seeds = torch.randint(2**62, (len(prompts),)).tolist()
        with Guest(model) as guest:
            generations = decode(
                guest,
                prompts,
                generation_config.max_length - input_ids.shape[1],
                resa_config,
                sampling,
                generators=[torch.Generator().manual_seed(seed) for seed in seeds],
                stop_tokens=ends,
            )

        # Pad the rows to one length, as the library does.
        pad = generation_config.pad_token_id
        pad = pad if pad is not None else ends[0] if ends else 0
        rows = [generation.tokens for generation in generations]
        longest = max(map(len, rows))
        padded = [tokens + [pad] * (longest - len(tokens)) for tokens in rows]
        return torch.cat((input_ids, input_ids.new_tensor(padded)), dim=1)

    return loop


class Guest(GPT):
    """A `transformers` model in the place of a `GPT`: its own layers around our attention."""

    def __init__(self, theirs: nn.Module) -> None:
        nn.Module.__init__(self)  # no weights of our own
        self.config = config_from_values("model.config", theirs.config.to_diff_dict())
        self.ops = REFERENCE_OPS
        self.theirs = theirs
        self.embed = theirs.get_input_embeddings()
        self.output = theirs.get_output_embeddings()

    def __enter__(self) -> Guest:
        """Give the model the attention that is registered here, until `__exit__`."""
        self.before = self.theirs.config._attn_implementation
        self.theirs.set_attn_implementation(NAME)
        return self

    def __exit__(self, *exception: object) -> None:
        self.theirs.set_attn_implementation(self.before)

    def hidden_states(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Final hidden states [B, Q, C], as `GPT.hidden_states` returns them."""
        body = self.theirs.base_model
        return body(
            input_ids=tokens, position_ids=positions, use_cache=False, attend=attend
        ).last_hidden_state


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


def _check(
    generation_config: object, processors: list, criteria: list, inputs: Mapping[str, object]
) -> None:
    """Refuse requests that this decode loop does not honour."""
    for argument, allowed, given in (
        ("logits_processor", PROCESSORS, processors),
        ("stopping_criteria", CRITERIA, criteria),
    ):
        for each in given:
            name = type(each).__name__
            require(name in allowed, argument, name, ", ".join(sorted(allowed)))

    for name, given in inputs.items():
        is_known, kind = name in INPUTS or given is None, type(given).__name__
        require(is_known, name, kind, "input_ids and attention_mask alone")
        layers, allowed = getattr(given, "layers", ()), "none: generation begins with the prompt"
        is_filled = any(getattr(layer, "is_initialized", False) for layer in layers)
        require(not is_filled, name, "a cache with tokens in it", allowed)

    for name, plain in (
        ("prompt_lookup_num_tokens", (None,)),
        ("num_beams", (None, 1)),
        ("num_return_sequences", (None, 1)),
        ("return_dict_in_generate", (None, False)),
    ):
        given = getattr(generation_config, name, None)
        require(given in plain, name, given, str(plain[-1]))


AttentionInterface.register(NAME, _attention)
