"""`python -m lutjax.cli`."""

import sys

from lutjax.cli.main import main

sys.exit(main())
