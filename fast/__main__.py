"""`python -m resa.fast` is the command `resa`."""

import sys

from .cli import main

sys.exit(main())
