"""`python -m sketchfast`, and so `torchrun -m sketchfast`."""

import sys

from .cli import main

sys.exit(main())
