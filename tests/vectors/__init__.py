"""Conformance vectors (`resa.vectors`): written by tests/make_vectors.py, read by `resa conformance`."""
