"""A reward model from preferences: a LoRA adapter with a scalar head, ready to be PPO-Max's reward role.

The same as `trl-ext reward-model`; `--help` says more. Its body is trl_ext/scripts/reward_model.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.command import run

if __name__ == "__main__":
    run("reward-model", sys.argv[1:])
