"""How much several reward models believe each label, and what to do with the doubtful ones.

The same as `trl-ext preference-strength`; `--help` says more. Its body is trl_ext/scripts/preference_strength.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.command import run

if __name__ == "__main__":
    run("preference-strength", sys.argv[1:])
