"""Share of the branches that coverage saw, of the whole package: its own limit counts lines and branches together."""

from __future__ import annotations

import json
import sys
from pathlib import Path

LEAST = 95.0

if __name__ == "__main__":
    totals = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["totals"]
    share = 100 * totals["covered_branches"] / totals["num_branches"]
    print(f"{totals['covered_branches']} of {totals['num_branches']} branches: {share:.1f}%, at least {LEAST:.0f}%")
    sys.exit(share < LEAST)
