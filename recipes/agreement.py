"""How well annotators agree, by annotator and by topic, and who is off.

The same as `trl-ext agreement`; `--help` says more. Its body is trl_ext/scripts/agreement.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.command import run

if __name__ == "__main__":
    run("agreement", sys.argv[1:])
