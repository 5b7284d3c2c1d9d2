"""Measurements of models and of decoding; each module is one question, and `resa eval` asks it."""
