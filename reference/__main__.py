"""`python -m resa.reference` is the command `resa` with the reference alone."""

import sys

from .cli import main

sys.exit(main())
