"""Starts the vLLM server that rollouts are sampled through, and says what to give the trainer.

`--help` says more; what it does is in trl_ext/scripts/vllm_serve.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.vllm_serve import main

if __name__ == "__main__":
    main()
