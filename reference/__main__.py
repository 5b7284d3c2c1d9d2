"""`python -m resa.reference` is the command `resa` with the reference alone."""

import sys

from .cli.main import main

sys.exit(main())
