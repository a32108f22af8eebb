"""The label page: which of two answers is better? Every label is on disk before the next pair is shown.

The same as `trl-ext label`; `--help` says more. Its body is trl_ext/scripts/label.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.command import run

if __name__ == "__main__":
    run("label", sys.argv[1:])
