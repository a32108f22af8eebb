"""What a policy refuses of harmful prompts, and of harmless ones that look like them: rates, and its worst answers.

    trl-ext red-team --policy out/ppo
    trl-ext red-team --policy out/ppo --prompts mine.jsonl --output_dir out/red_team
    trl-ext red-team --answers answered.jsonl --output_dir out/red_team

48 short prompts come with the package: enough to see that a policy refuses nothing, or everything. They are asked as a
user's message where the tokenizer has a chat template. A line of a file of your own has `prompt` (a text or messages),
`harmful` (true: it should be refused; false: it should be answered) and perhaps `category`. With `--answers` it has
`responses` too, and nothing is sampled. A policy is an adapter, the folder of a finished run, or
`base`; a run that was stopped goes on. Refusals are found by their words. `--reward_adapter`, of a harmlessness model,
sorts the answers to harmful prompts, the worst first.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trl import ModelConfig

from trl_ext.scripts.arguments import LORA, check_model_flags, names_of
from trl_ext.scripts.judging import member_scores
from trl_ext.scripts.parsing import FlagParser, Given
from trl_ext.scripts.running import check_output_dir, quiet_libraries, write_json
from trl_ext.scripts.tables import last_text, print_table

SHOWN = 5


@dataclass
class RedTeamArguments:
    """Which policy, on which prompts."""

    policy: str | None = field(default=None, metadata={"help": "An adapter, a finished run, or base."})
    prompts: str | None = field(
        default=None,
        metadata={"help": "jsonl file with prompt, harmful, perhaps category. Default: 48 that come with the package."},
    )
    answers: str | None = field(default=None, metadata={"help": "In place of both: such a file, with responses."})
    count: int = field(default=4, metadata={"help": "Answers to each prompt."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer, tokens."})
    sampling_temperature: float = field(default=1.0, metadata={"help": "Of the policy."})
    seed: int = field(default=0, metadata={"help": "Of the answers."})
    reward_adapter: list[str] | None = field(
        default=None, metadata={"help": "Reward adapters on the same base that say which answers are worst."}
    )
    output_dir: str = field(default="runs/red_team", metadata={"help": "Where answers and the result go."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let the model bring code of its own."})


def parse(arguments: list[str]) -> tuple[RedTeamArguments, ModelConfig, Given]:
    """Flags over config file.

    Raises:
        ValueError: What is missing, a number out of its range, or a flag that would be dropped.
    """
    recipe, model_args, given = FlagParser((RedTeamArguments, ModelConfig), "red-team").parse(arguments)
    for name in ("count", "max_new_tokens"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"--{name} {getattr(recipe, name)} must be at least 1.")
    if not recipe.sampling_temperature > 0:
        raise ValueError(f"--sampling_temperature {recipe.sampling_temperature} must be above 0.")
    given.refuse([*LORA, "use_peft"], "nothing is trained here. Drop it.")
    if recipe.answers is not None:
        names = ["policy", "prompts", "count", "max_new_tokens", "sampling_temperature", "seed"]
        given.refuse(names, "--answers holds what was said, and nothing is sampled. Drop one.")
        if not recipe.reward_adapter:
            given.refuse(names_of(ModelConfig), "no model is loaded for --answers. Drop it.")
    elif recipe.policy is None:
        raise ValueError("--policy is missing: an adapter, a finished run, or base; or --answers, with responses.")
    check_model_flags(given, model_args)
    return recipe, model_args, given


def read_rows(path: str, answered: bool) -> list[dict[str, Any]]:
    """The rows of a file, checked.

    Raises:
        FileNotFoundError, ValueError: There is no such file, or a row that cannot be used.
    """
    from trl_ext.data.reading import read_json_rows
    from trl_ext.data.rows import RowError
    from trl_ext.feedback.red_team import check_red_team_rows

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file. Name a jsonl file with prompt and harmful.")
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(read_json_rows(path)):
        if isinstance(row, RowError):
            raise ValueError(f"{path}, row {number}: {row}. Mend or remove the line.")
        texts: Any = row.get("responses")
        if answered and not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
            raise ValueError(f"{path}, row {number}: responses={texts!r} must be a list of texts, at least one.")
        rows.append(dict(row))
    check_red_team_rows(rows, path)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Let the policy answer, count, and show rates and the worst answers."""
    quiet_libraries()
    recipe, model_args, _ = parse(sys.argv[1:] if arguments is None else arguments)
    from trl_ext.feedback.pairs import without_nan
    from trl_ext.feedback.red_team import PROMPTS, refusal_report, share_text

    rows = read_rows(str(recipe.answers or recipe.prompts or PROMPTS), answered=recipe.answers is not None)
    check_output_dir(recipe.output_dir)
    folder = Path(recipe.output_dir)
    if recipe.answers is None or recipe.reward_adapter:
        rows = answered(recipe, model_args, rows, folder)
    report = refusal_report(rows)
    content = asdict(report)
    for name in ("categories", "intervals"):
        content[name] = {k if isinstance(k, str) else f"{k[0]}, {k[1]}": v for k, v in content[name].items()}
    write_json(folder / "red_team.json", without_nan(content))
    print_table(f"Refusals of {recipe.policy or recipe.answers}", ("", "share"), report.rows())
    for found in report.answered[:SHOWN]:
        score = "" if found["score"] is None else f", score {found['score']:.2f}"
        print_table(f"answered{score}: {last_text(found['prompt'])}", ("", "answer"), [("", found["answer"].strip())])
    print(f"answered harmful prompts: {share_text(*report.broken)}; all of them in {folder / 'red_team.json'}")


def answered(
    recipe: RedTeamArguments, model_args: ModelConfig, rows: list[dict[str, Any]], folder: Path
) -> list[dict[str, Any]]:
    """The rows with the policy's answers, where there are none, and with scores, where adapters give them."""
    from datasets import Dataset

    from trl_ext.roles import read_adapter
    from trl_ext.rrhf import load_responses
    from trl_ext.scripts.inputs import check_prompt_rows
    from trl_ext.scripts.judge import check_policy, sample
    from trl_ext.scripts.models import encoder_by_name, load_placed_base, tokenizer_of

    adapter = None if recipe.policy is None else check_policy(recipe.policy)
    rewards = [read_adapter(path, f"--reward_adapter {path}") for path in recipe.reward_adapter or ()]
    brought = [each.config.base_model_name_or_path for each in [adapter, *rewards] if each is not None]
    name = model_args.model_name_or_path or next(iter(brought), None)
    if name is None:
        raise ValueError("--model_name_or_path is missing: the base, which no adapter names.")
    model_args.model_name_or_path = name
    tokenizer = tokenizer_of(model_args, recipe, padding_side="left")
    encoder = encoder_by_name(tokenizer, model_args, recipe)
    if recipe.prompts is None and recipe.answers is None and tokenizer.chat_template is not None:
        rows = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in rows])
    check_prompt_rows(prompts, str(recipe.prompts or recipe.answers or "the prompts of the package"))
    base = load_placed_base(model_args, recipe)
    if recipe.answers is None:
        path = folder / "answers.jsonl"
        sample(recipe, base, encoder, adapter, prompts, path, str(recipe.policy), recipe.count)
        said = load_responses(path)["responses"]
        rows = [row | {"responses": texts} for row, texts in zip(rows, said, strict=True)]
    if rewards:
        flat = [(row["prompt"], text) for row in rows for text in row["responses"]]
        scores, _ = member_scores(base, encoder, recipe.reward_adapter or (), *map(list, zip(*flat, strict=True)))
        means = iter(scores.mean(1).tolist())
        rows = [row | {"scores": [next(means) for _ in row["responses"]]} for row in rows]
    return rows
