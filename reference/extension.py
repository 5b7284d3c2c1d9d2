"""ReSA inside the library `transformers`, through its own extension points: an attention and a decode loop.

    from resa.reference.extension import rectified

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generate(**inputs, max_new_tokens=256, custom_generate=rectified(active_ratio=0.1, interval=32))

The model stays that library's own: its layers run, and hand every layer's queries, keys and values to the attention
registered here under the name "resa", which passes them on to the decode loop of `generate.py`. No weight is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from .checks import require
from .config import ReSAConfig
from .generate import Generation, generate
from .model import GPT, REFERENCE_OPS, Attend
from .pretrained import config_from_values

NAME = "resa"
# What the library may ask of a decode loop, and this one does.
PROCESSORS = {"TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper"}
CRITERIA = {"MaxLengthCriteria", "EosTokenCriteria"}
# What the library adds to its inputs on its own account: the mask counts, the rest says nothing of the tokens.
INPUTS = {"attention_mask", "position_ids", "use_cache", "cache", "past_key_values", "cache_position", "logits_to_keep"}


def rectified(*, decode: Callable[..., Generation] = generate, **config: object) -> Callable[..., Tensor]:
    """A decode loop for `model.generate(custom_generate=…)`; the keywords are those of `ReSAConfig`.

    Greedy or sampled with temperature, top_k and top_p, ragged batches padded on the left, as the library has them.
    `decode` has the signature of `resa.reference.generate`. Errors: ValueError naming what is not supported, before any
    work.
    """
    resa_config = ReSAConfig(**config)

    def loop(
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: list,
        stopping_criteria: list,
        generation_config: object,
        **inputs: object,  # the mask among them: named here, the library would pass it twice
    ) -> Tensor:
        _check(generation_config, logits_processor, stopping_criteria, inputs)
        mask, places = inputs.get("attention_mask"), inputs.get("position_ids")
        is_real = torch.ones_like(input_ids) if mask is None else mask
        counted = (is_real.cumsum(dim=1) - 1)[is_real.bool()]
        is_counted = places is None or torch.equal(
            places.expand_as(input_ids)[is_real.bool()], counted.to(places.dtype)
        )
        require(is_counted, "position_ids", "others", "the tokens' places, which need not be given")
        prompts = [row[real.bool()].tolist() for row, real in zip(input_ids, is_real, strict=True)]
        ends = generation_config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        is_sampled = generation_config.do_sample
        seeds = torch.randint(2**62, (len(prompts),)).tolist()  # so that torch.manual_seed decides
        with Guest(model) as guest:
            generation = decode(
                guest,
                prompts,
                generation_config.max_length - input_ids.shape[1],
                resa_config,
                temperature=(generation_config.temperature or 1.0) if is_sampled else 0.0,
                top_p=(generation_config.top_p or 1.0) if is_sampled else 1.0,
                top_k=(generation_config.top_k or None) if is_sampled else None,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                stop_tokens=ends,
            )
        pad = generation_config.pad_token_id
        pad = pad if pad is not None else ends[0] if ends else 0
        longest = max(len(tokens) for tokens in generation.tokens)
        rows = [tokens + [pad] * (longest - len(tokens)) for tokens in generation.tokens]
        return torch.cat((input_ids, torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)), dim=1)

    return loop


class Guest(GPT):
    """A `transformers` model in the place of a `GPT`: its own layers, with the attention that it is handed."""

    def __init__(self, theirs: nn.Module) -> None:
        nn.Module.__init__(self)  # no weights of our own
        self.config = config_from_values("model.config", theirs.config.to_diff_dict())
        self.ops = REFERENCE_OPS
        self.theirs, self.embed, self.output = theirs, theirs.get_input_embeddings(), theirs.get_output_embeddings()

    def __enter__(self) -> Guest:
        """While the context lasts, the model's attention is the one registered here."""
        self.before = self.theirs.config._attn_implementation
        self.theirs.set_attn_implementation(NAME)
        return self

    def __exit__(self, *exception: object) -> None:
        self.theirs.set_attn_implementation(self.before)

    def transform(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """As `GPT.transform`."""
        body = self.theirs.base_model
        return body(input_ids=tokens, position_ids=positions, use_cache=False, attend=attend).last_hidden_state


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object, attend: Attend | None = None, **__: object
) -> tuple[Tensor, None]:
    """The registered attention: query [B, Hq, Q, D], key and value [B, Hkv, Q, D] → out [B, Q, Hq, D]."""
    given = "none outside of generate"
    require(attend is not None, f"attention {NAME!r}", given, "model.generate(custom_generate=rectified(…))")
    return attend(module.layer_idx, query, key, value).transpose(1, 2).contiguous(), None


def _check(generation_config: object, processors: list, criteria: list, inputs: Mapping[str, object]) -> None:
    for argument, allowed, given in (
        ("logits_processor", PROCESSORS, processors),
        ("stopping_criteria", CRITERIA, criteria),
    ):
        for each in given:
            name = type(each).__name__
            require(name in allowed, argument, name, ", ".join(sorted(allowed)))
    for name, given in inputs.items():
        require(name in INPUTS or given is None, name, type(given).__name__, "input_ids and attention_mask alone")
        is_filled = any(getattr(layer, "is_initialized", False) for layer in getattr(given, "layers", ()))
        require(not is_filled, name, "a cache with tokens in it", "none: generation begins with the prompt")
    for name, plain in (
        ("prompt_lookup_num_tokens", (None,)),
        ("num_beams", (None, 1)),
        ("num_return_sequences", (None, 1)),
        ("return_dict_in_generate", (None, False)),
    ):
        given = getattr(generation_config, name, None)
        require(given in plain, name, given, str(plain[-1]))


AttentionInterface.register(NAME, _attention)
