"""`python -m qzoom_agent` is the `qzoom` command."""

import sys

from qzoom_agent.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
