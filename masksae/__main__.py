"""`python -m masksae`: the command line, also where an environment's scripts are not on PATH."""

import sys

from masksae.app.cli import main

sys.exit(main())
