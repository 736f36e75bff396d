"""python -m fastbert: the command line."""

import sys

from fastbert.cli import main

sys.exit(main())
