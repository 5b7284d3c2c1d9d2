"""Shapes of models whose whole steps are timed, by their names. Weights are random."""

from resa.reference.config import GPTConfig

CONTEXT = 2**20  # more than is measured
QWEN_7B = GPTConfig(
    vocab_size=152_064, n_layer=28, n_head=28, n_kv_head=4, head_dim=128, hidden_size=3584,
    intermediate_size=18_944, context=CONTEXT, rope_theta=1e6, qkv_bias=True, tied_embeddings=False,
)  # fmt: skip
SHAPES = {
    "qwen2.5-7b": QWEN_7B,
    "qwen3-0.6b": GPTConfig(
        vocab_size=151_936, n_layer=28, n_head=16, n_kv_head=8, head_dim=128, hidden_size=1024,
        intermediate_size=3072, context=CONTEXT, rope_theta=1e6, qk_norm=True, tied_embeddings=True,
    ),
    "smollm2-135m": GPTConfig(
        vocab_size=49_152, n_layer=30, n_head=9, n_kv_head=3, head_dim=64, hidden_size=576,
        intermediate_size=1536, context=CONTEXT, rope_theta=1e5, tied_embeddings=True,
    ),
}  # fmt: skip
