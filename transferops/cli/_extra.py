"""The extra that the command line needs: imported first, it says what is missing and how to get it."""

from __future__ import annotations

EXTRA = 'pip install "transferops[cli]"'

for _package in ("click", "rich"):
    try:
        __import__(_package)
    except ImportError:
        raise SystemExit(f"error: the command line needs {_package}; install it with: {EXTRA}") from None
