"""``python -m pyglow_fast`` is the ``pyglow-fast`` command."""

import sys

from pyglow_fast.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
