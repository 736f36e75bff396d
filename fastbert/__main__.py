"""python -m fastbert: the command line."""

import sys

from fastbert.cli.main import main

sys.exit(main())
