"""Scores and spread of a reward ensemble on what the policy of a run wrote.

The same as `trl-ext reward-shift`; `--help` says more. Its body is trl_ext/scripts/reward_shift.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.command import run

if __name__ == "__main__":
    run("reward-shift", sys.argv[1:])
