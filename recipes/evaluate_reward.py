"""How good a reward model is: accuracy, calibration, length bias, agreement with others; a table and pictures.

The same as `trl-ext evaluate-reward`; `--help` says more. Its body is trl_ext/scripts/evaluate_reward.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.command import run

if __name__ == "__main__":
    run("evaluate-reward", sys.argv[1:])
