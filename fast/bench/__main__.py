"""`python -m resa.fast.bench`: as `resa bench`; without a word what to measure, one layer's attention."""

import sys

from ..cli import main

words = sys.argv[1:]
sys.exit(main(["bench", *(words if words and not words[0].startswith("-") else ["layer", *words])]))
