"""Write docs/bad-input.md from the tables of malformed calls in the tests.

python scripts/bad_input_page.py > docs/bad-input.md
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from bad_input_table import page

if __name__ == "__main__":
    print(page(), end="")
