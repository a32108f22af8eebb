"""Two policies compared by a model behind an endpoint, every pair in both orders.

The same as `trl-ext judge`; `--help` says more. Its body is trl_ext/scripts/judge.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.command import run

if __name__ == "__main__":
    run("judge", sys.argv[1:])
