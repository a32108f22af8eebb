"""The whole road: preferences -> reward models -> PPO-Max -> do held-out reward models prefer the tuned answers?

The same as `trl-ext pipeline`; `--help` says more. Its body is trl_ext/scripts/pipeline.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.command import run

if __name__ == "__main__":
    run("pipeline", sys.argv[1:])
