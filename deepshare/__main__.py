"""`python -m deepshare`: the command line without the installed script."""

import sys

from deepshare.cli import main

sys.exit(main())
