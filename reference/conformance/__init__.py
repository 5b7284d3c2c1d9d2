"""The conformance kit: checks a port against cases, and names the law that broke.

`docs/porting.md` says what a port offers. The kit needs NumPy alone, so it runs where neither torch
nor Triton is: `python -m resa.conformance my_port.py`.
"""

if __name__ != "resa.conformance":
    raise ImportError(
        "the folder `reference/conformance` is the package `resa.conformance`: `make install`, then"
        " import that"
    )
