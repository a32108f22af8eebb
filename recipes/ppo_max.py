"""PPO-Max: policy, reference, reward and critic on one frozen base. Without arguments, in an embedded world.

The same as `trl-ext ppo-max`; `--help` says more. Its body is trl_ext/scripts/ppo_max.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.command import run

if __name__ == "__main__":
    run("ppo-max", sys.argv[1:])
