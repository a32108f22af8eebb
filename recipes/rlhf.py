"""SFT -> reward models -> PPO-Max -> judge, and rounds of labels between them, on one base loaded once.

The same as `trl-ext rlhf`; `--help` says more. Its body is trl_ext/scripts/rlhf.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.command import run

if __name__ == "__main__":
    run("rlhf", sys.argv[1:])
