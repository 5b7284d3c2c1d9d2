"""The home of the Triton rendering of `resa.reference`, under the same names and signatures.

It holds nothing yet; decode with `resa.reference`, whose `GPT(config, ops=…)` will take these operations.
"""

if __name__ != "resa.fast":
    raise ImportError("the folder `fast` is the package `resa.fast`: run `make install`, then import that")

__all__: list[str] = []
