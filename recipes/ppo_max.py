"""PPO-Max: policy, reference, reward and critic on one frozen base. Without arguments, in an embedded world.

`--help` says more; what it does is in trl_ext/scripts/ppo_max.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.ppo_max import main

if __name__ == "__main__":
    main()
