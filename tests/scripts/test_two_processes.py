"""Whole recipes on two and on four real processes (gloo): one run, whose processes end with equal adapters.

Where nothing is sampled by each process for itself it is also the run of one process on the whole batch. What samples
online draws other completions on each process: `tests/ppo/test_engines.py` and `tests/rrhf/test_distributed.py` compare
the updates on given ones.
"""

import json
from pathlib import Path

import pytest
import torch

from tests.processes import run_script
from tests.scripts.pairs import write_pairs
from trl_ext.toy import build_world

FOUR = pytest.param(4, marks=pytest.mark.slow)
QUICK = [
    "--logging_steps=1",
    "--use_cpu=true",
    "--report_to=none",
    "--save_strategy=no",
    "--gradient_checkpointing=false",
]


def launch(recipe: str, folder: Path, *flags: str, processes: int = 2) -> str:
    """Run a recipe of `trl_ext.scripts` on so many processes; its output."""
    script = Path(__file__).with_name("on_two_processes.py")
    done = run_script(script, recipe, folder, *flags, processes=processes, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def check_equal(folder: Path, trainer: str, processes: int = 2) -> dict[str, torch.Tensor]:
    """All processes were wrapped, trained, and hold the same adapters to the last bit; these."""
    left, *others = (torch.load(folder / f"{trainer}-rank{rank}.pt") for rank in range(processes))
    assert len(others) == processes - 1
    for right in others:
        assert left["wrapped"] == right["wrapped"] == "DistributedDataParallel"
        for moment in ("start", "end"):
            assert left[moment].keys() == right[moment].keys()
            assert all(torch.equal(left[moment][name], right[moment][name]) for name in left[moment]), moment
    moved = [name for name in left["end"] if not torch.equal(left["start"][name], left["end"][name])]
    assert moved
    return left["end"]


def check_one_process(folder: Path, trainer: str, recipe: str, batch: int, ends: dict[str, torch.Tensor], *flags: str):
    """One process on the whole batch ends with the same adapters, but for the order of the sums."""
    launch(recipe, folder, f"--per_device_train_batch_size={batch}", *flags, processes=1)
    alone = torch.load(folder / f"{trainer}-rank0.pt")["end"]
    assert alone.keys() == ends.keys()
    for name, weight in alone.items():
        torch.testing.assert_close(
            ends[name], weight, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name} {text}"
        )


@pytest.mark.parametrize("processes", [2, FOUR])
def test_ppo_max(processes: int, tmp_path: Path) -> None:
    flags = [f"--output_dir={tmp_path / 'out'}", "--world_scale=0.02", "--max_steps=4", "--eval_prompts=8"]
    flags += ["--per_device_train_batch_size=4", "--critic_warmup_steps=1", "--per_device_eval_batch_size=4"]
    printed = launch("ppo_max", tmp_path, *flags, *QUICK, processes=processes)
    check_equal(tmp_path, "Trainer", processes)
    assert printed.count("Before and after PPO-Max") == 1
    found = json.loads((tmp_path / "out" / "before_after.json").read_text())
    assert found["before"]["step"] == 0
    assert found["before"]["eval_kl"] == pytest.approx(0, abs=1e-5)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    return build_world(tmp_path_factory.mktemp("world"), scale=0.02, template="chatml")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl and test.jsonl, conversations."""
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder)
    return folder


@pytest.mark.slow
def test_ppo_max_on_conversations_with_a_fresh_policy(world, pairs: Path, tmp_path: Path) -> None:
    flags = [f"--model_name_or_path={world.base}", f"--reward_adapter={world.reward_adapter}", "--lora_r=4"]
    flags += [f"--dataset_name={pairs}", "--dataset_test_split=test", f"--output_dir={tmp_path / 'out'}"]
    flags += ["--max_steps=4", "--per_device_train_batch_size=4", "--eval_prompts=8", "--max_completion_length=8"]
    launch("ppo_max", tmp_path, *flags, "--critic_warmup_steps=1", "--bf16=false", *QUICK)
    check_equal(tmp_path, "Trainer")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "steps"), [("vapo", 3), ("sao", 6)])
def test_presets_of_the_critic(world, tmp_path: Path, preset: str, steps: int) -> None:
    """One rollout batch that trains the critic alone, and two more."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in world.train_prompts.select(range(32))))
    flags = [f"--config={preset}", f"--model_name_or_path={world.base}", f"--reward_adapter={world.reward_adapter}"]
    flags += [f"--policy_adapter={world.policy_adapter}", f"--dataset_name={prompts}", f"--max_steps={steps}"]
    flags += [f"--output_dir={tmp_path / 'out'}", "--per_device_train_batch_size=4", "--max_completion_length=8"]
    flags += [f"--critic_warmup_steps={steps // 3}", "--learning_rate=1e-3", "--bf16=false", *QUICK]
    if preset == "vapo":
        flags.append("--best_lm_score=-100")  # every answer is one of the best
    launch("ppo_max", tmp_path, *flags)
    check_equal(tmp_path, "Trainer")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("online", [[], ["--online_every_steps=1", "--max_completion_length=8"]], ids=["", "online"])
def test_rrhf(online: list[str], processes: int, tmp_path: Path) -> None:
    flags = [f"--output_dir={tmp_path / 'out'}", "--world_scale=0.02", "--max_prompts=16", "--max_new_tokens=8"]
    flags += ["--eval_prompts=4", "--num_train_epochs=1", *QUICK]
    batch = f"--per_device_train_batch_size={8 // processes}"
    printed = launch("rrhf", tmp_path, *flags, *online, batch, processes=processes)
    ends = check_equal(tmp_path, "RRHFTrainer", processes)
    assert printed.count("Before and after RRHF") == 1
    if not online:
        check_one_process(tmp_path, "RRHFTrainer", "rrhf", 8, ends, *flags)


@pytest.mark.slow
def test_processes_share_the_prompts_of_an_evaluation(world, tmp_path: Path) -> None:
    prompts = world.eval_prompts.select(range(40))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    flags = [f"--policy_adapter={world.policy_adapter}", f"--reward_adapter={world.reward_adapter}"]
    flags += [f"--dataset_name={tmp_path / 'prompts.jsonl'}", f"--dataset_test_name={tmp_path / 'prompts.jsonl'}"]
    flags += ["--eval_prompts=7", "--max_new_tokens=8"]
    written = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        printed = launch("evaluate_policy", tmp_path, *flags, f"--output_dir={out}", processes=processes)
        assert printed.count("7 prompts; below each figure") == 1
        written.append([json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()])
    assert [line["prompt"] for line in written[0]] == [*prompts["prompt"][:7]] * 2
    for one, two in zip(*written, strict=True):
        assert one["completion"] == two["completion"]
        assert one["reward"] == pytest.approx(two["reward"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [2, 4])
def test_reward_model(processes: int, tmp_path: Path) -> None:
    flags = [f"--output_dir={tmp_path / 'out'}", "--world_scale=0.03", "--max_steps=4", "--warmup_steps=0", *QUICK]
    batch = f"--per_device_train_batch_size={16 // processes}"
    printed = launch("reward_model", tmp_path, *flags, batch, processes=processes)
    ends = check_equal(tmp_path, "RewardModelTrainer", processes)
    assert printed.count("test pairs") == 2  # the announcement and the table
    check_one_process(tmp_path, "RewardModelTrainer", "reward_model", 16, ends, *flags)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_pipeline(world, pairs: Path, processes: int, tmp_path: Path) -> None:
    (tmp_path / "reward.yaml").write_text(
        "use_cpu: true\ngradient_checkpointing: false\nreport_to: none\nsave_strategy: 'no'\nmax_steps: 2\n"
        "bf16: false\nper_device_train_batch_size: 4\nlearning_rate: 1.0e-3\ndisable_tqdm: true\n"
    )
    flags = [f"--model_name_or_path={world.base}", f"--policy_adapter={world.policy_adapter}", "--members=2"]
    flags += [f"--dataset_name={pairs}", "--dataset_test_split=test", f"--output_dir={tmp_path / 'out'}"]
    flags += [f"--reward_config={tmp_path / 'reward.yaml'}", "--judged_prompts=6", "--max_completion_length=8"]
    flags += ["--max_steps=4", "--per_device_train_batch_size=4", "--steps_per_generation=2", "--bf16=false"]
    launch("pipeline", tmp_path, *flags, "--critic_warmup_steps=0", *QUICK, processes=processes)
    for trainer in ("RewardModelTrainer", "PPOMaxTrainer"):
        check_equal(tmp_path, trainer, processes)
    found = json.loads((tmp_path / "out" / "judgement.json").read_text())
    assert found["win"] + found["tie"] + found["loss"] == pytest.approx(1)
