"""What a PPO run needs on a card, phase by phase, from the model's configuration alone: nothing is loaded.

`--help` says more; what it does is in trl_ext/scripts/plan_memory.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.plan_memory import main

if __name__ == "__main__":
    main()
