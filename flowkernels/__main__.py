"""`python -m flowkernels` is `flowkernels`."""

import sys

from flowkernels.cli import main

sys.exit(main())
