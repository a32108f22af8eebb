"""Every command and every piece of Python, yaml and json on README and the pages: read by what would run it."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from tests.snippets import Commands, Python, blocks, commands

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
KINDS = {"bash", "python", "yaml", "json", ""}
# What stands for a reader's own: his data, his model, what a page has said in words before
GIVEN = frozenset({"prompts", "tokenizer", "policy", "reward_model", "value_model", "tokenized", "preferences"})
GIVEN |= {"inputs", "input_ids", "attention_mask", "my_score", "trainer"}
# Pages that take up names where another page has imported them
IMPORTED = "from peft import LoraConfig\nfrom trl_ext import PPOMaxConfig, PPOMaxTrainer, Role, SharedBaseModel\n"
VLLM = ("--logprobs-mode", "--gpu-memory-utilization", "--max-lora-rank")  # flags of its own


def options() -> set[str]:
    """Fields of every configuration."""
    from trl import ModelConfig

    from trl_ext import PPOMaxConfig, RewardModelConfig, RRHFConfig

    return {
        f.name for each in (PPOMaxConfig, RewardModelConfig, RRHFConfig, ModelConfig) for f in dataclasses.fields(each)
    }


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_is_one_that_its_program_takes(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Commands(ROOT, monkeypatch)
    for command in commands(page.read_text()):
        try:
            reader.check(command)
        except (AssertionError, ValueError, SystemExit) as error:
            pytest.fail(f"{page.name}: `{command}`: {error!r}")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_piece_of_python_compiles_and_calls_what_there_is(page: Path) -> None:
    reader = Python(GIVEN)
    if page.name == "migrating.md":  # shows TRL's old names
        reader.names |= {"PPOTrainer", "PPOConfig"}
    reader.check(IMPORTED)
    for block in blocks(page.read_text()):
        if block.kind == "python":
            compile(block.text, page.name, "exec")
            assert reader.check(block.text) == [], f"{page.name}, block at line {block.line}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_other_block_is_of_a_kind_that_is_read(page: Path) -> None:
    for block in blocks(page.read_text()):
        assert block.kind in KINDS, f"{page.name}, line {block.line}: {block.kind}"
        if block.kind == "json":
            assert all(json.loads(line) for line in block.text.splitlines())
        if block.kind == "yaml":
            unknown = set(yaml.safe_load(block.text)) - options()
            assert unknown == set(), f"{page.name}, line {block.line}"


def test_flags_and_settings_in_sentences_are_those_of_some_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--flag` and `option: value`, in backticks, where no command stands before them."""
    from trl_ext.scripts.launching import LauncherFlags

    known = {*Commands(ROOT, monkeypatch).every_flag(), *LauncherFlags()._option_string_actions, *VLLM, "--"}
    for script in [*(ROOT / "tests" / "benchmarks").glob("*.py"), *(ROOT / "recipes" / "experiments").glob("*.py")]:
        known |= set(re.findall(r"\"(--\w+)\"", script.read_text()))
    names = options() | {"truncated", "enable_thinking"}  # a column; an option of a chat template
    for page in PAGES:
        for flag in re.findall(r"`(--[\w-]*)", page.read_text()):
            assert flag.rstrip("_") in known or any(each.startswith(flag) for each in known if flag.endswith("_")), (
                f"{page.name}: {flag}"
            )
        for name in re.findall(r"`(\w+): [\w.\-\[\]]+`", page.read_text()):
            assert name in names, f"{page.name}: {name}"


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("trl-ext ppo_max", "there is no command ppo_max"),
        ("trl-ext ppo-max --kl_targt 3", "--kl_targt: no such flag"),
        ("trl-ext ppo-max --kl_tar 3", "--kl_tar: no such flag"),
        ("trl-ext ppo-max --kl_targt 3 ...", "--kl_targt: no such flag"),
        ("trl-ext ppo-max --kl_target much", "SystemExit"),
        ("trl-ext ppo-max --config qlora_9b --model_name_or_path MODEL", "qlora_9b"),
        ("trl-ext report runs/a --outpt x.html", "--outpt: no such flag"),
        ("trl-ext vllm-serve --modell MODEL", "--modell: no such flag"),
        ("accelerate launch recipes/ppo_min.py", "recipes/ppo_min.py"),
        ("accelerate launch --num_processes 2 recipes/rrhf.py --rank_coeff 1", "--rank_coeff: no such flag"),
        ("torchrun --nproc_per_node 2 -m trl_ext rlfh", "there is no command rlfh"),
        ("python tests/benchmarks/bench_passes.py --repeat 2", "--repeat"),
        ('pip install -e ".[tests]"', "extras are"),
        ("pytest -m fast", "no marker fast"),
        ("pytest tests/test_nothing.py", "tests/test_nothing.py"),
        ("trl sft --use_pefft", "no flag --use_pefft"),
        ("trlext ppo-max", "knows no program"),
    ],
)
def test_a_command_that_is_wrong_is_found(command: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, ValueError, SystemExit)) as found:
        Commands(ROOT, monkeypatch).check(command)
    assert wrong in repr(found.value)


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("from trl_ext import PPOTrainer", "trl_ext has no PPOTrainer"),
        ('PPOMaxConfig("out", kl_targt=3)', "kl_targt"),
        ("PPOMaxTrainer()", "missing a required argument"),
        ('SharedBaseModel.from_pretrained("base", policy_adaptor="sft")', "policy_adaptor"),
        ('model = SharedBaseModel.from_pretrained("base")\nmodel.generate_all()', "has no generate_all"),
        ('model = SharedBaseModel.from_pretrained("base")\nmodel.role(Role.REFEREE)', "has no REFEREE"),
        ('model = SharedBaseModel.from_pretrained("base")\nmodel.save_adapter()', "missing a required argument"),
        ("print(promptz)", "promptz comes from nowhere"),
        ("def f(a):\n    return b", "b comes from nowhere"),
    ],
)
def test_python_that_is_wrong_is_found(code: str, wrong: str) -> None:
    reader = Python(GIVEN)
    reader.check(IMPORTED)
    assert wrong in "; ".join(reader.check(code))


def test_commands_are_found_wherever_they_stand() -> None:
    page = "Say `trl-ext ppo-max\n--help`.\n\n    python a.py \\\n        --b 1\n\n"
    page += "```bash\nX=1 pip install y && pytest  # all\n```\n"
    assert commands(page) == ["X=1 pip install y", "pytest", "python a.py --b 1", "trl-ext ppo-max --help"]
