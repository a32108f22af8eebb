"""Run by test_resume.py: trains until the first checkpoint is complete, and is killed. python run_and_die.py JSON"""

import json
import os
import signal
import sys
from pathlib import Path

from transformers import TrainerCallback

from tests.ppo import tiny


class KillAfterSave(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    job = json.loads(sys.argv[1])
    trainer = tiny.trainer(
        Path(job["world"]),
        Path(job["folder"]),
        ptx_dataset=tiny.texts(),
        callbacks=[KillAfterSave()],
        **job["config"],
    )
    trainer.train()


if __name__ == "__main__":
    main()
