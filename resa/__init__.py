"""The name that all parts share: `resa.reference` is the paper in PyTorch, `resa.fast` the kernels.

In a clone those are the folders `reference/` and `fast/`. `pyproject.toml` says what lies where.
"""

from pkgutil import extend_path

__version__ = "0.1.0"

# At the root of a clone Python finds this folder before an installed package, which has the rest.
__path__ = extend_path(__path__, __name__)
