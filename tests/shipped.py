"""Which results count for a model that is shipped."""

import json

from resa.reference.weights.checkpoint import file_digest, shipped_checkpoint

RECORDS = {"model": "record.json", "carrying": "carrying.json"}


def record(name="model"):
    """The record of a shipped model's training, as it lies beside the file."""
    return json.loads((shipped_checkpoint().parent / RECORDS[name]).read_text(encoding="utf-8"))


def digests(name="model"):
    """SHA-256 of the shipped file, of the same weights before they were deflated, and of those in 16 bits, if any.

    Results measured before the rounding count for both: docs/log.md has the figures of both.
    """
    found = record(name)
    assert found["sha256"] == file_digest(shipped_checkpoint(name)), f"{RECORDS[name]} is of another file"
    return {found[name] for name in ("sha256", "deflated_from", "rounded_from") if name in found}
