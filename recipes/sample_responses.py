"""K responses to every prompt, scored, in a jsonl file that survives being killed: what RRHF trains on.

`--help` says more; what it does is in trl_ext/scripts/sample_responses.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.sample_responses import main

if __name__ == "__main__":
    main()
