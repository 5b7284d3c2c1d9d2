"""`python -m resa.fast.bench` is `resa bench`; without a word it measures one layer's attention."""

import sys

from ..cli import main

words = sys.argv[1:]
sys.argv[1:] = ["bench", *(words if words and not words[0].startswith("-") else ["layer", *words])]
sys.exit(main())
