"""A page about one run, or about several beside each other: one HTML file.

The same as `trl-ext report`; `--help` says more. Its body is trl_ext/scripts/report.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.command import run

if __name__ == "__main__":
    run("report", sys.argv[1:])
