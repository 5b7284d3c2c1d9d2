"""ReSA inside `transformers`: its tokens, its requests, and that nothing is left behind on the caller's model."""

import importlib
import threading

import pytest
import torch
from torch import nn

from families import FAMILIES, random_model, texts, tokens_of
from resa.reference import ReSAConfig, Sampling, generate
from resa.reference.weights.pretrained import load_pretrained
from strategies import DEVICE, HEAD_DIMS
from untouched import snapshot

transformers = pytest.importorskip("transformers", reason="the extra `dev` has it")
extension = importlib.import_module("resa.reference.weights.extension")  # needs transformers
generation = importlib.import_module("transformers.generation")

ONE_FAMILY = pytest.mark.parametrize("family", ["qwen3-tied-yarn"], indirect=True)
SPARSE = {"interval": 4, "block_size": 4, "min_blocks": 2}


def left_padded(prompts, device="cpu"):
    """A ragged batch for the library: rows padded on the left with a token that counts elsewhere, and the mask."""
    longest = max(map(len, prompts))
    rows = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return rows, {"attention_mask": mask}


def continued(model, fed, loop=None, **options):
    """New tokens of each row by the library's `generate`, greedy unless told otherwise, through `loop` if given."""
    options = {"attention_mask": torch.ones_like(fed), "do_sample": False, **options}
    return model.generate(fed, custom_generate=loop, **options)[:, fed.shape[1] :].tolist()


# --- Tokens ---


@pytest.mark.parametrize(("schedule", "selection"), [("fused", "bounds"), ("paper", "bounds"), ("fused", "sketch")])
def test_models_of_transformers_decode_with_resa_by_name(family, schedule, selection):
    """They give the tokens of this project's own model and loop; the loop gets the whole batch in one call."""
    theirs, folder = family
    sparse = {"interval": 8, "block_size": 4, "min_blocks": 2, "schedule": schedule, "selection": selection}
    prompts = texts(90, 40)
    ours, calls, check = load_pretrained(folder), [], snapshot(theirs)

    def decode(model, prompts, *arguments, **options):
        calls.append(prompts)
        return generate(model, prompts, *arguments, **options)

    fed, masked = left_padded(prompts)
    loop = extension.rectified(decode=decode, **sparse)
    found = theirs.generate(fed, **masked, max_new_tokens=20, do_sample=False, custom_generate=loop)
    expected = tokens_of(generate(ours, prompts, 20, ReSAConfig(**sparse)))
    assert found[:, 90:].tolist() == expected
    assert torch.equal(found[:, :90], fed)
    assert calls == [prompts]
    dense = tokens_of(generate(ours, prompts, 20, ReSAConfig(interval=1)))
    assert dense != expected, "sparse steps must show, or the loop could be anyone's"
    check()


@pytest.mark.fast
@pytest.mark.parametrize("family", FAMILIES if DEVICE == "cuda" else ["qwen3-tied-yarn"], indirect=True)
@pytest.mark.parametrize("schedule", ["fused", "paper"] if DEVICE == "cuda" else ["fused"])
def test_they_decode_on_the_kernels_too(family, schedule):
    """The loop of `resa.fast` in the place of the reference's: through CUDA graphs where there is a GPU."""
    fast = pytest.importorskip("resa.fast.generate", reason="triton comes for Linux only")
    theirs, folder = family
    ours = load_pretrained(folder)
    if ours.config.head_dim not in HEAD_DIMS:
        pytest.skip("a head dimension that the kernels don't have")
    prompts, sparse = texts(18, 5), {"interval": 2, "block_size": 8, "min_blocks": 2, "schedule": schedule}
    fed, masked = left_padded(prompts, DEVICE)
    loop = extension.rectified(decode=fast.generate, **sparse)
    check = snapshot(theirs.to(DEVICE))
    found = theirs.generate(fed, **masked, max_new_tokens=6, do_sample=False, custom_generate=loop)
    check()
    theirs.cpu()
    assert found[:, 18:].tolist() == tokens_of(generate(ours, prompts, 6, ReSAConfig(**sparse)))


# --- Side by side ---


def interrupted(event):
    """A decode loop that calls `event` when it has chosen its third token."""

    def decode(model, prompts, *arguments, on_token, **options):
        begin = len(prompts[0])

        def tell(sequence, position, token):
            if position == begin + 2:
                event()

        return generate(model, prompts, *arguments, on_token=tell, **options)

    return decode


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"], indirect=True)
def test_generations_run_side_by_side(family):
    """A begins, B begins and ends inside of it, plain ones between them; all tokens are as if alone."""
    theirs, folder = family
    first, second = (torch.tensor([text]) for text in texts(41, 30))
    ours, options = load_pretrained(folder), {"max_new_tokens": 12}
    check, seen = snapshot(theirs), []

    def others():
        seen.append(continued(theirs, first, **options))  # plain
        seen.append(continued(theirs, second, extension.rectified(**SPARSE), **options))
        seen.append(continued(theirs, second, **options))

    found = continued(theirs, first, extension.rectified(decode=interrupted(others), **SPARSE), **options)
    sparse = [tokens_of(generate(ours, fed.tolist(), 12, ReSAConfig(**SPARSE))) for fed in (first, second)]
    plain = [tokens_of(generate(ours, fed.tolist(), 12, ReSAConfig(interval=1))) for fed in (first, second)]
    assert found == sparse[0]
    assert seen == [plain[0], sparse[1], plain[1]]
    assert plain[0] != sparse[0], "sparse steps must show"
    check()


@ONE_FAMILY
def test_generations_run_in_threads(family):
    """Rectified and plain ones, which meet before their third token, so that all of them are under way."""
    theirs, folder = family
    ours, check, results, errors = load_pretrained(folder), snapshot(theirs), {}, []
    prompts, together = texts(30, 41, 35, 22), threading.Barrier(4, timeout=60)

    class Meeting(generation.StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            if input_ids.shape[1] == len(prompts[0]) + 3:
                together.wait()
            return torch.zeros(1, dtype=torch.bool)

    def run(index):
        options = {"stopping_criteria": [Meeting()]} if index == 0 else {}
        loop = extension.rectified(decode=interrupted(together.wait), **SPARSE) if index else None
        try:
            results[index] = continued(theirs, torch.tensor([prompts[index]]), loop, max_new_tokens=16, **options)[0]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[index]) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    dense = generate(ours, prompts[:1], 16, ReSAConfig(interval=1))
    expected = tokens_of(dense + generate(ours, prompts[1:], 16, ReSAConfig(**SPARSE)))
    assert [results[index] for index in range(4)] == expected
    check()


def test_a_model_is_as_it_was_after_an_error(family):
    def broken(*_, **__):
        raise KeyError("broken")

    theirs, check = family[0], snapshot(family[0])
    with pytest.raises(KeyError, match="broken"):
        continued(theirs, torch.tensor(texts(9)), extension.rectified(decode=broken), max_new_tokens=2)
    check()


# --- Adapted and spread models ---


class Adapter(nn.Module):
    """A low-rank adapter around a projection."""

    def __init__(self, base):
        super().__init__()
        self.base, generator = base, torch.Generator().manual_seed(7)
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=generator))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=generator) * 0.2)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def adapt(model, kind):
    layer = model.model.layers[1]
    if kind == "adapter":
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
    elif kind == "hook on a layer":
        layer.register_forward_hook(lambda module, inputs, out: out + 0.7)
    elif kind == "hook before a projection":
        layer.mlp.up_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5,))
    elif kind == "parametrised":
        nn.utils.parametrize.register_parametrization(layer.self_attn.v_proj, "weight", Doubled())
    else:  # a projection's own forward
        plain = layer.mlp.down_proj.forward
        layer.mlp.down_proj.forward = lambda x: plain(x) * 2
    return model


@pytest.mark.parametrize(
    "kind", ["adapter", "hook on a layer", "hook before a projection", "parametrised", "projection's own forward"]
)
def test_adapted_models_decode_as_adapted(kind):
    """Dense decoding through the extension gives the tokens of the library's own, which are not the base model's."""
    fed, model = torch.tensor(texts(25)), random_model("llama")
    base = continued(model, fed, max_new_tokens=12)
    check = snapshot(adapt(model, kind))
    expected = continued(model, fed, max_new_tokens=12)
    assert expected != base
    assert continued(model, fed, extension.rectified(interval=1), max_new_tokens=12) == expected
    check()


def hooked(model):
    model.register_forward_hook(lambda module, inputs, out: out)


def offloaded(model):
    """Weights of one projection elsewhere, as accelerate leaves them; a hook of its own fetches them."""
    projection = model.model.layers[2].mlp.up_proj
    projection.weight = nn.Parameter(projection.weight.to("meta"))


def rerouted(model):
    """A layer's forward is bound to the layer that accelerate found."""
    layer = model.model.layers[1]
    layer.forward = layer.forward


def detoured(model):
    """A layer that calls another, which is no part of the model."""
    inner = model.model.layers[1]

    class Detour(nn.Module):
        def forward(self, *arguments, **options):
            return inner(*arguments, **options)

    model.model.layers[1] = Detour()


def overridden(model):
    class Loud(type(model)):
        def forward(self, *arguments, **options):
            return super().forward(*arguments, **options)

    model.__class__ = Loud


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hooked, "model: got a forward hook; allowed: hooks on its parts"),
        (offloaded, "model: got devices cpu, meta; allowed: all weights in the memory of one device"),
        (lambda model: model.to("meta"), "model: got device meta; allowed: all weights in the memory of one device"),
        (rerouted, r"model\.model\.layers\.1\.forward: got a function set on the instance"),
        (detoured, r"model: attention calls: got \[0, 2\]; allowed: one of each of the 3 layers"),
        (overridden, r"model\.forward: got that of Loud; allowed: that of a class of transformers"),
    ],
)
def test_models_whose_tokens_would_be_others_are_refused(change, message):
    model, fed = random_model("llama"), torch.tensor(texts(9))
    change(model)
    with pytest.raises(ValueError, match=message):
        extension.rectified()(
            model=model,
            input_ids=fed,
            logits_processor=[],
            stopping_criteria=[generation.MaxLengthCriteria(12)],
            generation_config=transformers.GenerationConfig(),
        )


# --- Requests ---

REQUESTS = [
    ({"repetition_penalty": 1.5}, "logits_processor: got RepetitionPenaltyLogitsProcessor; allowed: "),
    ({"return_dict_in_generate": True}, "return_dict_in_generate: got True"),
    ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens: got 3"),
    ({"position_ids": torch.arange(20)[None] + 7}, "position_ids: got others"),
    (
        {"inputs_embeds": torch.zeros(1, 20, 48)},
        "inputs_embeds: got Tensor; allowed: input_ids and attention_mask alone",
    ),
    ({"num_beams": 2}, "num_beams: got 2; allowed: 1"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "generation mode: got contrastive_search; allowed: greedy search or sampling"),
    ({"max_time": 3.0}, "stopping_criteria: got MaxTimeCriteria; allowed: MaxLengthCriteria, EosTokenCriteria"),
]


@ONE_FAMILY
def test_what_the_decode_loop_does_not_do_is_refused(family):
    theirs, _ = family
    fed = torch.tensor(texts(20))
    options = {"attention_mask": torch.ones_like(fed), "max_new_tokens": 4, "custom_generate": extension.rectified()}
    filled = {"cache": theirs(fed[:, :8], use_cache=True).past_key_values}
    for request, message in [*REQUESTS, (filled, "cache: got a cache with tokens in it")]:
        with pytest.raises(ValueError, match=message):
            theirs.generate(fed, do_sample=False, **request, **options)
    with pytest.raises(ValueError, match="assistant_model: got Qwen3ForCausalLM; allowed: None"):
        theirs.generate(fed, assistant_model=theirs, **options)
    other = random_model("qwen3")
    other.set_attn_implementation("resa")
    with pytest.raises(ValueError, match="attention 'resa': got none outside of generate"):
        other(fed)


@ONE_FAMILY
def test_stopping_criteria_count_by_their_value(family):
    """The library's own loop is the judge: the caller's stand in the place of the configuration's."""
    theirs, _ = family
    fed, dense = torch.tensor(texts(4)), extension.rectified(interval=1)
    length, end = generation.MaxLengthCriteria, generation.EosTokenCriteria
    tokens = continued(theirs, fed, dense, max_new_tokens=9)[0]
    third = tokens[2]
    assert third not in tokens[:2]
    for criteria, asked, n_tokens in (
        ([length(6)], {"max_new_tokens": 8}, 2),
        ([length(9)], {"max_new_tokens": 2}, 5),
        ([length(9), length(7)], {}, 3),
        ([length(3)], {"max_new_tokens": 8}, 1),
        ([end(third)], {"max_new_tokens": 8}, 3),
        ([end([third, 96]), length(9)], {}, 3),
        ([end(third)], {"eos_token_id": tokens[0], "max_new_tokens": 8}, 3),
    ):
        options = {"stopping_criteria": criteria, "pad_token_id": 0, **asked}
        assert continued(theirs, fed, dense, **options)[0] == tokens[:n_tokens], options
        assert continued(theirs, fed, **options)[0] == tokens[:n_tokens], f"the library itself: {options}"

    class Longer(length):
        def __call__(self, *arguments, **options):
            return ~super().__call__(*arguments, **options)

    with pytest.raises(ValueError, match="stopping_criteria: got Longer; allowed: MaxLengthCriteria"):
        continued(theirs, fed, dense, stopping_criteria=[Longer(6)], max_new_tokens=8)


@ONE_FAMILY
def test_sampling_and_stop_tokens_reach_the_decode_loop(family):
    """Temperature, top_k and top_p do what they do in `generate`; a stop token ends its row, which it pads as well."""
    theirs, folder = family
    fed = torch.tensor(texts(30, 30))
    options = {"attention_mask": torch.ones_like(fed), "custom_generate": extension.rectified(interval=4)}
    warpers = {"temperature": 0.8, "top_p": 0.9, "top_k": 11}

    def sampled(seed, **more):
        torch.manual_seed(seed)
        return theirs.generate(fed, max_new_tokens=24, do_sample=True, **options, **(warpers | more))

    def expected(seed, **more):
        torch.manual_seed(seed)
        seeds = torch.randint(2**62, (2,)).tolist()
        own = [torch.Generator().manual_seed(seed) for seed in seeds]
        sampling = Sampling(**(warpers | more))
        return tokens_of(generate(ours, fed.tolist(), 24, ReSAConfig(interval=4), sampling, generators=own))

    ours, first = load_pretrained(folder), sampled(1)
    assert first[:, 30:].tolist() == expected(1)
    for change in ({"temperature": 1.0}, {"top_p": 1.0}, {"top_k": 97}):  # each matters
        other = sampled(1, **change)[:, 30:].tolist()
        assert other == expected(1, **change)
        assert other != first[:, 30:].tolist(), change
    assert sampled(1, top_k=0)[:, 30:].tolist() == expected(1, top_k=None)
    assert not torch.equal(first, sampled(2))
    end = int(first[0, 30 + 5])
    stopped = sampled(1, eos_token_id=end, pad_token_id=end)[0, 30:].tolist()
    place = stopped.index(end)
    assert place <= 5
    assert stopped[: place + 1] == first[0, 30 : 31 + place].tolist()
    assert set(stopped[place:]) == {end}


@ONE_FAMILY
def test_no_share_at_all_leaves_the_likeliest_token(family):
    theirs, _ = family
    fed, loop = torch.tensor(texts(30)), extension.rectified(interval=4)
    greedy = continued(theirs, fed, loop, max_new_tokens=12)
    for seed in range(3):
        torch.manual_seed(seed)
        assert continued(theirs, fed, loop, max_new_tokens=12, do_sample=True, top_p=0.0, top_k=0) == greedy


TEMPERATURE, TOP_K, TOP_P = (
    getattr(generation, f"{name}LogitsWarper") for name in ("Temperature", "TopK", "TopP")
)  # fmt: skip


@ONE_FAMILY
def test_warpers_count_by_their_value(family):
    """The caller's come first, then the configuration's; an order that `Sampling` does not have is refused."""
    theirs, _ = family
    fed, seen = torch.tensor(texts(20)), []

    def decode(model, prompts, n_tokens, config, sampling, **options):
        seen.append(sampling)
        return generate(model, prompts, n_tokens, config, sampling, **options)

    def sampling_of(processors, **asked):
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **asked}
        continued(
            theirs, fed, extension.rectified(decode=decode), logits_processor=processors, max_new_tokens=1, **options
        )
        return seen[-1]

    assert sampling_of([]) == Sampling(1.0)
    assert sampling_of([TOP_P(0.25)]) == Sampling(1.0, top_p=0.25)
    assert sampling_of([TEMPERATURE(0.5), TOP_K(7)], temperature=0.5, top_p=0.5) == Sampling(0.25, 0.5, 7)
    assert sampling_of([TOP_K(7, min_tokens_to_keep=9)], top_k=12) == Sampling(1.0, top_k=9)
    assert sampling_of([TOP_P(0.25), TOP_K(3)], do_sample=False) == Sampling()

    class Other(TOP_K):
        pass

    for processors, asked, message in (
        (
            [TOP_P(0.25)],
            {"top_p": 0.5},
            "got TopPLogitsWarper after TopPLogitsWarper; allowed: temperature, then top-k",
        ),
        ([TOP_P(0.25)], {"top_k": 5}, "got TopKLogitsWarper after TopPLogitsWarper"),
        ([TOP_P(0.25)], {"temperature": 0.5}, "got TemperatureLogitsWarper after TopPLogitsWarper"),
        ([TOP_P(0.25, min_tokens_to_keep=2)], {}, r"TopPLogitsWarper\.min_tokens_to_keep: got 2; allowed: 1"),
        (
            [TOP_K(3, filter_value=0.0)],
            {"do_sample": False},
            r"TopKLogitsWarper\.filter_value: got 0\.0; allowed: -inf",
        ),
        ([Other(3)], {}, "got Other; allowed: TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper"),
    ):
        with pytest.raises(ValueError, match=f"logits_processor: {message}"):
            sampling_of(processors, **asked)


class Recorder(generation.BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], 0

    def put(self, value):
        self.parts.append(value.flatten().tolist())

    def end(self):
        self.ended += 1


@ONE_FAMILY
def test_a_streamer_gets_the_tokens(family):
    """It gets what the library's own loop gives: the prompt, each token, the end."""
    theirs, _ = family
    fed, ours, library = torch.tensor(texts(9)), Recorder(), Recorder()
    found = continued(theirs, fed, extension.rectified(interval=1), max_new_tokens=6, streamer=ours)
    assert continued(theirs, fed, max_new_tokens=6, streamer=library) == found
    assert (ours.parts, ours.ended) == (library.parts, library.ended)
    assert ours.parts == [fed[0].tolist(), *([token] for token in found[0])]
    with pytest.raises(ValueError, match="streamer: got one for 2 prompts; allowed: one for a single prompt"):
        continued(theirs, fed.expand(2, -1), extension.rectified(), max_new_tokens=6, streamer=Recorder())
