"""`python -m peftbench` is the command line."""

import sys

from peftbench.cli import main

sys.exit(main())
