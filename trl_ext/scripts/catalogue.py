"""The commands of `trl-ext`: where each is, what it does, and the page that its `--help` shows.

A new command is one more line of `COMMANDS`: its module has a `main(arguments)`. A command with a `Page` shows that for
`--help`; one without brings its own. Nothing here imports a library, so that a page is there at once.
"""

import shutil
import textwrap
from dataclasses import dataclass

from trl_ext.scripts.feedback_pages import AGREEMENT, CHOOSE, JUDGE, LABEL, RED_TEAM, REWARD_SHIFT, RLHF
from trl_ext.scripts.pages import (
    COMPARE,
    EVALUATE,
    EVALUATE_REWARD,
    PIPELINE,
    PLAN_MEMORY,
    PPO_MAX,
    REWARD_MODEL,
    RRHF,
    SAMPLE,
    STRENGTH,
    Page,
)

WIDTH = 100
FLAG_WIDTH = 38


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        module: With a `main(arguments)`.
        summary: One line of the overview.
        page: For `--help`.
        launched: Whether it is started through accelerate, on as many devices as there are.
        loads: What takes the seconds before its first own line.
    """

    module: str
    summary: str
    page: Page | None = None
    launched: bool = False
    loads: str = "PyTorch, transformers and TRL"


COMMANDS: dict[str, Command] = {
    "ppo-max": Command("trl_ext.scripts.ppo_max", "tune a policy with PPO-Max", PPO_MAX, launched=True),
    "reward-model": Command(
        "trl_ext.scripts.reward_model", "train a reward model from preferences", REWARD_MODEL, launched=True
    ),
    "rrhf": Command("trl_ext.scripts.rrhf", "tune a policy by ranking responses", RRHF, launched=True),
    "pipeline": Command(
        "trl_ext.scripts.pipeline", "preferences -> reward models -> PPO-Max -> judgement", PIPELINE, launched=True
    ),
    "rlhf": Command("trl_ext.scripts.rlhf", "SFT -> reward models -> PPO-Max -> judge, in rounds, on one base", RLHF),
    "sample": Command("trl_ext.scripts.sample_responses", "sample and score responses, into a file", SAMPLE),
    "evaluate": Command(
        "trl_ext.scripts.evaluate_policy", "a finished policy on held-out prompts", EVALUATE, launched=True
    ),
    "compare": Command(
        "trl_ext.scripts.compare", "several finished policies: table, picture, page", COMPARE, launched=True
    ),
    "evaluate-reward": Command(
        "trl_ext.scripts.evaluate_reward", "how good a reward model is, table and pictures", EVALUATE_REWARD
    ),
    "preference-strength": Command(
        "trl_ext.scripts.preference_strength", "find labels that reward models doubt", STRENGTH, launched=True
    ),
    "choose": Command("trl_ext.scripts.choose", "which pairs of answers people should label next", CHOOSE),
    "label": Command("trl_ext.scripts.label", "label pairs on a local page; labels to preferences", LABEL),
    "agreement": Command("trl_ext.scripts.agreement", "how far annotators agree, and who is off", AGREEMENT),
    "judge": Command("trl_ext.scripts.judge", "two policies, judged by a model, reward models or people", JUDGE),
    "red-team": Command("trl_ext.scripts.red_team", "what a policy refuses of harmful and harmless prompts", RED_TEAM),
    "reward-shift": Command(
        "trl_ext.scripts.reward_shift", "whether a run's reward is still to be trusted", REWARD_SHIFT
    ),
    "plan-memory": Command("trl_ext.scripts.plan_memory", "what a run needs on a card", PLAN_MEMORY),
    "vllm-serve": Command("trl_ext.scripts.vllm_serve", "start a vLLM server that rollouts are sampled through"),
    "report": Command(
        "trl_ext.scripts.report", "a page about one run, or several beside each other", loads="matplotlib"
    ),
}


# ---------------------------------------------------------------------- as text


def overview() -> str:
    """What `trl-ext` and `trl-ext --help` print."""
    lines = ["usage: trl-ext COMMAND [--flag value ...]", ""]
    lines += [f"  {name:22}{command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "trl-ext COMMAND --help shows the flags most used, --help-all every flag; trl-ext --version."]
    return "\n".join([*lines, "Begin with `trl-ext ppo-max`: a small world, on a CPU, in minutes, no download."])


def render(name: str, width: int | None = None) -> str:
    """The page of a command, in at most `WIDTH` columns.

    Raises:
        ValueError: The command has no page.
    """
    command = COMMANDS[name]
    if command.page is None:
        raise ValueError(f"trl-ext {name} has no page: its --help is its own.")
    width = min(WIDTH, width or shutil.get_terminal_size().columns)
    lines = [f"usage: trl-ext {name} [--flag value ...]", *textwrap.wrap(command.page.text, width), "", "examples:"]
    lines += [f"  {line}" for line in command.page.examples]
    for title, rows in command.page.groups.items():
        lines.append(f"{title}:")
        for flag, default, text in rows:
            head = f"  --{flag} {default}".rstrip()
            lines.append(f"{head:{FLAG_WIDTH}}{'' if len(head) < FLAG_WIDTH else '  '}{text}")
    rest = "A flag's default stands behind it. --help-all: every flag"
    if command.launched:
        rest += "; --num_processes 2, --config_file fsdp2_8, ... go to accelerate's launcher"
    return "\n".join([*lines, *textwrap.wrap(f"{rest}.", width)])
