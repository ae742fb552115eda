"""``python -m lexiseg`` is the ``lexiseg`` command."""

import sys

from lexiseg.cli import main

if __name__ == "__main__":
    sys.exit(main())
