"""`python -m k2kernels`."""

import sys

from k2kernels.cli import main

sys.exit(main())
