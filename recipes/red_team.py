"""What a policy refuses of a file of prompts, harmful and harmless ones.

The same as `trl-ext red-team`; `--help` says more. Its body is trl_ext/scripts/red_team.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.command import run

if __name__ == "__main__":
    run("red-team", sys.argv[1:])
