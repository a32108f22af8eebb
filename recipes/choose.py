"""Which pairs of answers to label next, by what a label would tell about a reward ensemble.

`--help` says more; what it does is in trl_ext/scripts/choose.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.choose import main

if __name__ == "__main__":
    main()
