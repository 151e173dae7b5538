"""``python -m exit_plugins`` is the command ``exit-plugins``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
