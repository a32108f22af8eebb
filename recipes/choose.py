"""Which pairs of answers to label next, by what a label would tell about a reward ensemble.

The same as `trl-ext choose`; `--help` says more. Its body is trl_ext/scripts/choose.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.command import run

if __name__ == "__main__":
    run("choose", sys.argv[1:])
