"""`python -m ondol`."""

from __future__ import annotations

import sys

from ondol.cli import main

if __name__ == "__main__":
    sys.exit(main())
