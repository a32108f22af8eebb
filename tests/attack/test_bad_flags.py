"""Command lines as people type them: refused by the flag, before anything is loaded."""

from pathlib import Path

import pytest

from tests.attack.clear import problem_of
from trl_ext.scripts import pipeline, ppo_max, reward_model, rrhf

pytestmark = pytest.mark.slow

RECIPES = {"ppo_max": ppo_max, "rrhf": rrhf, "reward_model": reward_model, "pipeline": pipeline}
NEEDED = {
    "ppo_max": ["--model_name_or_path=m", "--dataset_name=d", "--reward_funcs=f", "--output_dir=x", "--use_cpu"],
    "rrhf": ["--model_name_or_path=m", "--dataset_name=d", "--reward_funcs=f", "--output_dir=x", "--use_cpu"],
    "reward_model": ["--model_name_or_path=m", "--dataset_name=d", "--output_dir=x", "--use_cpu"],
    "pipeline": ["--model_name_or_path=m", "--dataset_name=d", "--output_dir=x", "--use_cpu"],
}
FLAGS = [
    "--learning_rate=nan",
    "--learning_rate=-1",
    "--learning_rate=inf",
    "--learning_rate=0",
    "--learning_rate=fast",
    "--learning_rate=",
    "--learning_rat=1",
    "--lr=1",
    "--seed=-1",
    "--seed=99999999999999",
    "--seed=1.5",
    "--max_steps=0",
    "--max_steps=-2",
    "--num_train_epochs=0",
    "--num_train_epochs=-1",
    "--num_train_epochs=nan",
    "--per_device_train_batch_size=0",
    "--per_device_eval_batch_size=-4",
    "--gradient_accumulation_steps=0",
    "--save_strategy=sometimes",
    "--eval_strategy=sometimes",
    "--logging_strategy=sometimes",
    "--lr_scheduler_type=wavy",
    "--optim=magic",
    "--save_steps=0",
    "--logging_steps=0",
    "--weight_decay=nan",
    "--max_grad_norm=-1",
    "--warmup_steps=-1",
    "--bf16=maybe",
    "--disable_tqdm=maybe",
    "--accelerator_config={",
    "--lora_task_type=IMAGE",
    "--bnb_4bit_quant_type=nf4",
    "--world_scale=2",
    "--config",
    "--config=nowhere.yaml",
    "--no_such_flag",
    "--no_such_flag=1",
    "stray",
    "--resume_from_checkpoint=/no/such/checkpoint",
]


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_flag_that_makes_no_sense_is_named(recipe: str, flag: str, capsys, tmp_path: Path) -> None:
    arguments = [*NEEDED[recipe], f"--output_dir={tmp_path}", flag]
    name = flag.split("=")[0].removeprefix("--")
    with pytest.raises(BaseException) as found:
        RECIPES[recipe].main(arguments)
    if isinstance(found.value, SystemExit):  # argparse's own, for a value of another kind
        assert found.value.code == 2
        assert f"--{name}" in capsys.readouterr().err
    else:
        assert problem_of(found.value, [name], remedy=False) is None


CONFIGS = {
    "empty": "",
    "a list": "- a\n",
    "a text": "hello\n",
    "torn": "output_dir: [x\n",
    "tabs": "output_dir:\tx\n\tlearning_rate: 1\n",
    "unknown": "learning_rat: 1\n",
    "nested": "training:\n  learning_rate: 1\n",
    "number": "3\n",
    "twice": "seed: -1\n",
    "text for a number": "learning_rate: fast\n",
    "list for a number": "learning_rate: [1.0e-5]\n",
    "nan": "learning_rate: .nan\n",
    "no without quotes": "save_strategy: no\n",
}


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_config_file_that_is_none_is_named(recipe: str, content: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(BaseException) as found:
        RECIPES[recipe].main([*NEEDED[recipe], f"--output_dir={tmp_path / 'out'}", f"--config={path}"])
    key = content.split(":")[0].strip()
    if isinstance(found.value, SystemExit):
        assert f"--{key}" in capsys.readouterr().err
    else:
        named = [problem_of(found.value, [name], remedy=False) for name in (key or "run.yaml", "run.yaml")]
        assert None in named, named
