"""Several finished policies beside each other, without any training: a table, a picture, a page.

The same as `trl-ext compare`; `--help` says more. Its body is trl_ext/scripts/compare.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.command import run

if __name__ == "__main__":
    run("compare", sys.argv[1:])
