"""What a PPO run needs on a card, phase by phase, from the model's configuration alone: nothing is loaded.

The same as `trl-ext plan-memory`; `--help` says more. Its body is trl_ext/scripts/plan_memory.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.command import run

if __name__ == "__main__":
    run("plan-memory", sys.argv[1:])
