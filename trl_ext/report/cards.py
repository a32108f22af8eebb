"""Model cards: a header that the Hub reads, what was trained on what, before and after, samples, options, limits.

A card is published: it names no folder of the machine that wrote it, and no setting that is the machine's alone.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from trl_ext.report.intervals import Change, changes
from trl_ext.report.lines import CURVE, PLAIN, REPORT, Line
from trl_ext.report.loading import RunFiles, load_run
from trl_ext.report.machine import versions
from trl_ext.report.samples import text_of
from trl_ext.run_identity import MAY_CHANGE

METHOD = ("length", "batch")  # of what may change when a run goes on, what is no setting of the machine
NOT_METHOD = frozenset(name for group, names in MAY_CHANGE.items() if group not in METHOD for name in names)
NOT_METHOD |= {"logging_dir", "hub_token", "pad_to_multiple_of"}
NOT_METHOD |= {"generation_batch_size"}  # follows from `steps_per_generation`
ROWS, SAMPLES, LONGEST = 12, 5, 1200
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class CardFacts:
    """What every card needs of a run.

    Attributes:
        args: Configuration.
        base: Hub id or folder of the base.
        history: Log entries.
        folder: Where the run has been written down; None: it has not.
        facts: What makes the run (`RunIdentity.facts`).
        model_name, dataset_name, tags: As in `Trainer.create_model_card`; the dataset's may be a path.
    """

    args: Any
    base: str
    history: Sequence[Mapping[str, Any]]
    folder: Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    model_name: str | None = None
    dataset_name: str | None = None
    tags: str | list[str] | None = None

    @property
    def base_name(self) -> str:
        """The base as a reader may know it: its id; of a folder the last part."""
        return public(self.base) or "a base without a name"

    @property
    def title(self) -> str:
        """Of the card."""
        return self.model_name or Path(str(self.args.output_dir)).name

    def run(self) -> RunFiles | None:
        """What the run has left; None where that is nothing."""
        try:
            return load_run(self.folder) if self.folder is not None else None
        except ValueError:  # it has not begun
            return None


@dataclass
class CardKind:
    """What the cards of one method have in common.

    Attributes:
        pipeline_tag: As the Hub names the task.
        tags: Of every card.
        matters: Options that are shown also at their default.
        columns: Of the table of the run.
        required: The metric that an entry must have to be in it.
    """

    pipeline_tag: str
    tags: Sequence[str]
    matters: Sequence[str]
    columns: Sequence[str]
    required: str


def loading(facts: CardFacts, scorer: bool = False) -> list[str]:
    """Lines of Python that load the adapter with its base, by its id where that is known.

    Args:
        scorer: Whether it is a reward model, and no policy.
    """
    kind, name, more = "CausalLM", "policy", ""
    if scorer:
        kind, name, more = "SequenceClassification", "model", ", num_labels=1"
    return [
        "```python",
        f"from peft import AutoPeftModelFor{kind}",
        "from transformers import AutoTokenizer",
        "",
        f'name = "{facts.args.hub_model_id or "<id of this model>"}"',
        f"{name} = AutoPeftModelFor{kind}.from_pretrained(name{more})",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        "```",
    ]


def write_card(folder: str | Path, card: str) -> None:
    """Make a card the README of a folder."""
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(card, encoding="utf-8")


def whole_card(
    facts: CardFacts,
    kind: CardKind,
    body: Sequence[str],
    reward: str,
    evaluation: Sequence[str] | None = None,
    results: Sequence[tuple[str, float]] = (),
) -> str:
    """A card as text.

    Args:
        body: What the method says of its model, below the title.
        reward: Where the reward, or the preferences, came from.
        evaluation: Lines in place of before and after.
        results: (metric, value) for the Hub's header in place of those of the evaluation after training.
    """
    run = facts.run()
    pair = run.whole_evaluations() if run is not None else None
    found = changes(pair[0], pair[1]) if pair else []
    results = results or [(row.name.split(",")[0], row.after) for row in found]
    lines = ["---", header(facts, kind, results), "---", "", f"# {facts.title}", "", *body, ""]
    if evaluation is None:
        lines += ["## Before and after", "", *before_and_after(found), ""]
    else:
        lines += ["## Evaluation", "", *evaluation, ""]
    if _has(facts.folder, CURVE):
        lines += [f"![learning curve]({CURVE})", ""]
    lines += ["## How it was trained", "", *how(facts, reward), ""]
    lines += ["### Options", "", *options_table(facts.args, kind.matters), ""]
    lines += ["### The run", "", *course_table(facts.history, kind.columns, kind.required), ""]
    if pair:
        lines += ["## Samples", "", *samples(pair[0], pair[1]), ""]
    return "\n".join([*lines, "## Limits", "", *limits(facts, kind)]) + "\n"


def header(facts: CardFacts, kind: CardKind, results: Sequence[tuple[str, float]]) -> str:
    """The YAML header: what is a folder, or no id of the Hub's, is left out, as the Hub would refuse it."""
    more = [facts.tags] if isinstance(facts.tags, str) else facts.tags or []
    known = facts.dataset_name if _is_id(facts.dataset_name) else None
    data = ModelCardData(
        library_name="peft",
        pipeline_tag=kind.pipeline_tag,
        base_model=facts.base if _is_id(facts.base) else None,
        datasets=[known] if known else None,
        tags=list(dict.fromkeys([*kind.tags, *more])),
        model_name=facts.title if results else None,
        eval_results=[
            EvalResult(
                task_type=kind.pipeline_tag,
                dataset_type=known or "held-out",
                dataset_name=f"held-out rows of {known}" if known else "held-out rows",
                metric_type=re.sub(r"\W+", "_", name.lower()).strip("_"),
                metric_name=name,
                metric_value=round(float(value), 6),
            )
            for name, value in results
        ]
        or None,
    )
    return str(data.to_yaml()).strip()


def before_and_after(found: Sequence[Change]) -> list[str]:
    """Lines of a table with intervals."""
    if not found:
        return ["It has not been evaluated on held-out prompts before and after."]

    def cell(value: float, interval: tuple[float, float] | None) -> str:
        return f"{value:.4g}" + (f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else "")

    lines = ["| | before | after | change |", "| --- | --- | --- | --- |"]
    for row in found:
        cells = (cell(row.before, row.before_interval), cell(row.after, row.after_interval))
        lines.append(f"| {_cell(row.name)} | {' | '.join(cells)} | {cell(row.change, row.interval)} |")
    what = f"One completion to each of {found[0].count} held-out prompts."
    if found[0].interval is None:
        return [*lines, "", f"{what} Too few for intervals."]
    known = "They are of the choice of prompts, not of other training seeds."
    return [*lines, "", f"{what} In brackets 95 % bootstrap intervals over the prompts, paired for the change. {known}"]


def how(facts: CardFacts, reward: str) -> list[str]:
    """Lines about base, data, reward, seed and versions."""
    rows = facts.facts.get("rows of train_dataset")
    named = public(facts.dataset_name)
    data = f"`{named}`" if named else "a dataset without a name"
    count = f", {rows:,} rows" if isinstance(rows, int) else ""
    digest = facts.facts.get("content of train_dataset")
    installed = ", ".join(f"{name} {version}" for name, version in versions().items())
    return [
        f"* Base: `{facts.base_name}`",
        f"* Data: {data}{count}{f' (digest `{digest}`)' if digest else ''}",
        f"* Reward: {reward}",
        f"* Seed: {facts.args.seed}",
        f"* Versions: {installed}",
        *([f"* [{REPORT}]({REPORT}): curves, samples, configuration"] if _has(facts.folder, REPORT) else []),
    ]


def samples(before: Mapping[str, Line], after: Mapping[str, Line]) -> list[str]:
    """Lines of a few prompts, evenly spread over the evaluation, with what was written before and after."""
    keys = [key for key in before if key in after]
    count = min(SAMPLES, len(keys))
    lines = [f"{count} of {len(keys)} held-out prompts, evenly spread, not chosen by hand."]
    for i in range(count):
        key = keys[i * len(keys) // count]
        for name, content in (
            ("Prompt", before[key].get("prompt")),
            ("Before", before[key].get("completion")),
            ("After", after[key].get("completion")),
        ):
            row = {"Before": before, "After": after}.get(name, {}).get(key, {})
            reward = row.get("reward")
            lines += ["", f"{name}{f', reward {reward:.3g}' if isinstance(reward, float) else ''}:", ""]
            lines += fenced(text_of(content))
    return lines


def fenced(text: str) -> list[str]:
    """Lines that show a text as it is, whatever marks it holds; a long one is cut."""
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} [...]"
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{fence}text", *text.splitlines(), fence]


def limits(facts: CardFacts, kind: CardKind) -> list[str]:
    """Lines about what is not known of the model."""
    lines = [
        f"* An adapter: it needs `{facts.base_name}`, and has that model's knowledge, faults and licence terms. Those "
        "of the data apply too; no licence is given here.",
    ]
    if kind.pipeline_tag == "text-generation":
        lines += [
            "* A policy learns what its reward pays for, also where that is not what was meant: compare samples.",
            "* No evaluation of safety, truth or harm was made by this training.",
        ]
    else:
        lines += [
            "* Scores compare responses to one prompt; between prompts, and as a measure of quality, they say little.",
            "* It was trained on responses of certain models, and knows less of others.",
        ]
    return lines


# ---------------------------------------------------------------------- tables


def options_table(args: Any, matters: Sequence[str] = ()) -> list[str]:
    """Lines of a table of the fields that matter, and of those whose value is not the default."""
    changed = changed_options(args)
    shown = {name: _value(getattr(args, name)) for name in matters if hasattr(args, name)} | changed
    rows = [f"| `{name}` | {_cell(value)} | {'' if name in changed else 'default'} |" for name, value in shown.items()]
    return ["| option | value | |", "| --- | --- | --- |", *rows]


def changed_options(args: Any) -> dict[str, Any]:
    """Fields of a configuration whose value is not the default, None as "null", without those of the machine."""
    changed = {}
    for each in fields(args):
        value = getattr(args, each.name)
        plain = isinstance(value, PLAIN)
        if each.init and plain and each.name not in NOT_METHOD and value != each.default:
            changed[each.name] = _value(value)
    return changed


def course_table(history: Sequence[Mapping[str, Any]], columns: Sequence[str], required: str) -> list[str]:
    """Lines of a table of at most ROWS log entries with `required`, evenly spaced, the last one included."""
    entries = [entry for entry in history if required in entry]
    if not entries:
        return ["No step was logged."]
    last = len(entries) - 1
    picked = sorted({round(i * last / max(ROWS - 1, 1)) for i in range(ROWS)}) if last >= ROWS else range(last + 1)
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    for i in picked:
        lines.append("| " + " | ".join(_number(entries[i].get(name)) for name in columns) + " |")
    return lines


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _value(value: Any) -> Any:
    """As a table shows it; of a path the last part."""
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return "null" if value is None else value


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _is_id(name: str | None) -> bool:
    """Whether a name can be one of the Hub's: no folder or file that lies here, and of its form."""
    return name is not None and HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def public(name: str | None) -> str | None:
    """A name without the folders around it."""
    return name if name is None or _is_id(name) else Path(name).name


def _has(folder: Path | None, name: str) -> bool:
    return folder is not None and (folder / name).is_file()
