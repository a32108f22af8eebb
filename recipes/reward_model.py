"""A reward model from preferences: a LoRA adapter with a scalar head, ready to be PPO-Max's reward role.

`--help` says more; what it does is in trl_ext/scripts/reward_model.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.reward_model import main

if __name__ == "__main__":
    main()
