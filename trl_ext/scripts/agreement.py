"""How well annotators agree, by annotator and by topic, and who is off.

    trl-ext agreement pairs.jsonl --topic category

Labels are those of trl-ext label, in `pairs.labels` if no others are named. Intervals are 95 %, over pairs.
"""

import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trl_ext.scripts.parsing import FlagParser
from trl_ext.scripts.running import check_output_dir, quiet_libraries, write_json
from trl_ext.scripts.tables import print_table


@dataclass
class AgreementArguments:
    """Whose labels, of what."""

    pairs: str | None = field(default=None, metadata={"help": "jsonl file of pairs; may stand without --pairs."})
    labels: list[str] | None = field(
        default=None, metadata={"help": "Files of annotators, or folders of them. Default: pairs.labels."}
    )
    topic: str | None = field(default=None, metadata={"help": "Column of the pairs to report by."})
    resamples: int = field(default=1000, metadata={"help": "Bootstrap resamples of the pairs, for intervals."})
    seed: int = field(default=0, metadata={"help": "Of the resamples."})
    output_dir: str | None = field(default=None, metadata={"help": "Also write agreement.json there."})


def parse(arguments: list[str]) -> AgreementArguments:
    """Flags over config file.

    Raises:
        ValueError: No pairs, or a number of resamples that is none.
    """
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--pairs", *arguments]
    recipe, _ = FlagParser((AgreementArguments,), "agreement").parse(arguments)
    if recipe.pairs is None:
        raise ValueError("--pairs is missing: the jsonl file that was labelled.")
    if recipe.resamples < 1:
        raise ValueError(f"--resamples {recipe.resamples}: an interval needs at least 1, better 1000.")
    return recipe


def main(arguments: list[str] | None = None) -> None:
    """Measure, and show tables."""
    quiet_libraries()
    recipe = parse(sys.argv[1:] if arguments is None else arguments)
    from trl_ext.feedback.agreement import agreement_report
    from trl_ext.feedback.exchange import check_labels
    from trl_ext.feedback.labels import read_labels
    from trl_ext.feedback.pairs import read_pairs, without_nan

    pairs = read_pairs(str(recipe.pairs))
    if recipe.output_dir is not None:
        check_output_dir(recipe.output_dir)
    labels = check_labels(pairs, read_labels(recipe.labels or [Path(str(recipe.pairs)).with_suffix(".labels")]))
    report = agreement_report(labels, pairs, recipe.topic, recipe.resamples, recipe.seed)
    if recipe.output_dir is not None:
        content = asdict(report) | {"kappa": {" and ".join(k): asdict(v) for k, v in report.kappa.items()}}
        write_json(Path(recipe.output_dir) / "agreement.json", without_nan(content))
    show(report)


def show(report: Any) -> None:
    """The report as tables; in brackets the interval, in parentheses the pairs that it rests on."""
    rows = [
        ("pairs with a label", f"{report.pairs:,}"),
        ("with labels of several", f"{report.shared:,}"),
        ("share of agreement", str(report.share)),
        ("Krippendorff's alpha, direction", str(report.alpha)),
        ("Krippendorff's alpha, strength", str(report.alpha_strength)),
    ]
    print_table("Agreement", ("", "value"), rows)
    people = [
        (
            name,
            f"{habits['labels']:,}",
            str(habits["agreement"]),
            f"{habits['ties']:.0%}",
            "-" if math.isnan(habits["left"]) else f"{habits['left']:.0%}",
        )
        for name, habits in report.annotators.items()
    ]
    columns = ("annotator", "labels", "agreement with the others", "ties", "left preferred")
    print_table("Annotators", columns, people)
    if report.kappa:
        couples = [(f"{one} and {other}", str(value)) for (one, other), value in report.kappa.items()]
        print_table("Cohen's kappa", ("", "value"), couples)
    if report.topics:
        topics = [(name, str(found["share"]), str(found["alpha"])) for name, found in report.topics.items()]
        print_table("Topics", ("topic", "share of agreement", "alpha"), topics)
    for sentence in report.off:
        print(f"off: {sentence}")
