"""`python -m ondol`."""

from __future__ import annotations

from ondol.cli import program

if __name__ == "__main__":
    program()
