"""A finished policy on held-out prompts, beside where it started: figures with intervals, samples, a page.

The same as `trl-ext evaluate`; `--help` says more. Its body is trl_ext/scripts/evaluate_policy.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.command import run

if __name__ == "__main__":
    run("evaluate", sys.argv[1:])
