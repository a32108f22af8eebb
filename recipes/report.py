"""A page about one run, or about several beside each other: one HTML file.

`--help` says more; what it does is in trl_ext/scripts/report.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.report import main

if __name__ == "__main__":
    main()
