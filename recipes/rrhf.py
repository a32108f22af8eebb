"""RRHF: sample responses, score them, rank them. No critic, no rollout loop, one or two models.

The same as `trl-ext rrhf`; `--help` says more. Its body is trl_ext/scripts/rrhf.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.command import run

if __name__ == "__main__":
    run("rrhf", sys.argv[1:])
