"""Small random models of the Qwen2, Qwen3 and Llama 3 families, by `transformers`, for the tests of `weights/`.

Every weight is away from its neutral value, so that one in the wrong place shows.
"""

import torch

from resa.reference import Generation

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
    "eos_token_id": None,  # every continuation has its full length
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
FAMILIES = {
    "qwen2": ("Qwen2", {"rope_parameters": PLAIN}),
    "qwen2-tied-yarn": ("Qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"rope_parameters": PLAIN, "head_dim": 16}),
    "qwen3-tied-yarn": (
        "Qwen3",
        {"rope_parameters": {**YARN, "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False, "attention_factor": 1.25},
         "head_dim": 16, "tie_word_embeddings": True},
    ),
    "llama": ("Llama", {"rope_parameters": PLAIN}),
    "llama-3.1": ("Llama", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}),
    "llama-linear": ("Llama", {"rope_parameters": LINEAR, "head_dim": 16, "num_key_value_heads": 6}),
}  # fmt: skip


def random_model(family, **options):
    """A model of one of `FAMILIES`, in eval mode."""
    import transformers

    name, own = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **own, **options})
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.3))
            if parameter.dim() == 1:
                parameter += 1.0
    return model


def tokens_of(generations: list[Generation]) -> list[list[int]]:
    return [generation.tokens for generation in generations]


def texts(*sizes):
    """Random token ids, one list of each size."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, SIZES["vocab_size"], (size,), generator=generator).tolist() for size in sizes]
