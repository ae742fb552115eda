"""``python -m tests.parity DIR``; see :mod:`tests.parity.runner`."""

import sys

from tests.parity.runner import main

sys.exit(main())
