"""Starts the vLLM server that rollouts are sampled through, and says what to give the trainer.

The same as `trl-ext vllm-serve`; `--help` says more. Its body is trl_ext/scripts/vllm_serve.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from trl_ext.scripts.command import run

if __name__ == "__main__":
    run("vllm-serve", sys.argv[1:])
