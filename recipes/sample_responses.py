"""K responses to every prompt, scored, in a jsonl file that survives being killed: what RRHF trains on.

The same as `trl-ext sample`; `--help` says more. Its body is trl_ext/scripts/sample_responses.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.command import run

if __name__ == "__main__":
    run("sample", sys.argv[1:])
