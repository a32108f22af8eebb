"""Two policies compared by a model behind an endpoint, every pair in both orders.

`--help` says more; what it does is in trl_ext/scripts/judge.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.judge import main

if __name__ == "__main__":
    main()
