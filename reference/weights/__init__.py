"""Weights and text: checkpoints, tokenizers, and the models of other projects."""
