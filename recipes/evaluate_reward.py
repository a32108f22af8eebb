"""How good a reward model is: accuracy, calibration, length bias, agreement with others; a table and pictures.

`--help` says more; what it does is in trl_ext/scripts/evaluate_reward.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.evaluate_reward import main

if __name__ == "__main__":
    main()
