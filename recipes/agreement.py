"""How well annotators agree, by annotator and by topic, and who is off.

`--help` says more; what it does is in trl_ext/scripts/agreement.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.agreement import main

if __name__ == "__main__":
    main()
