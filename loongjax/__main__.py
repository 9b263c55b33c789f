"""`python -m loongjax`: the `loongjax` command."""

import sys

from loongjax.cli import main

sys.exit(main())
