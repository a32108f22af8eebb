"""The label page: which of two answers is better? Every label is on disk before the next pair is shown.

`--help` says more; what it does is in trl_ext/scripts/label.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.label import main

if __name__ == "__main__":
    main()
