"""The label page: which of two answers is better? Every label is on disk before the next pair is shown.

    trl-ext label pairs.jsonl                                   # open the address that it prints
    trl-ext label pairs.jsonl --export preferences.jsonl        # TRL's format, with strength
    trl-ext label pairs.jsonl --import_from others.csv --annotator ben

A line of the file has `prompt`, `answer_a` and `answer_b` (or two `responses`, or `chosen` and `rejected`). Labels go
to `pairs.labels/<annotator>.jsonl`, one line an act. On another address than 127.0.0.1 a token is asked for:
TRL_EXT_LABEL_TOKEN, or a random one that is printed.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from trl_ext.scripts.parsing import FlagParser, Given
from trl_ext.scripts.running import check_output_dir, quiet_libraries
from trl_ext.scripts.tables import print_table

TOKEN = "TRL_EXT_LABEL_TOKEN"
PAGE = ("criteria", "host", "port", "annotators", "seed", "show_skipped")
OUT = ("margin", "min_votes")


@dataclass
class LabelArguments:
    """What is labelled, where the page is, and where labels go."""

    pairs: str | None = field(default=None, metadata={"help": "jsonl file of pairs; may stand without --pairs."})
    labels: str | None = field(
        default=None, metadata={"help": "Folder of the annotators' files. Default: beside the pairs, pairs.labels."}
    )
    criteria: str | None = field(
        default=None, metadata={"help": "Text file that is shown on the side. Default: helpful, honest, harmless."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on. Another one needs a token."})
    port: int = field(default=7860, metadata={"help": "Port to listen on; 0 takes a free one."})
    annotators: list[str] | None = field(
        default=None, metadata={"help": "Names that may label. Default: whatever name is given on the page."}
    )
    seed: int = field(default=0, metadata={"help": "Decides which answer stands on the left, for each annotator."})
    show_skipped: bool = field(default=False, metadata={"help": "Show skipped pairs again at the end."})
    export: str | None = field(default=None, metadata={"help": "Write preferences to this jsonl file; no page."})
    margin: float | None = field(
        default=None, metadata={"help": "Export a column `margin`, this number times the strength (better 1, much 2)."}
    )
    min_votes: int = field(default=1, metadata={"help": "Export only pairs with so many labels."})
    import_from: str | None = field(
        default=None, metadata={"help": "Add labels of a csv or jsonl file that were made elsewhere; no page."}
    )
    annotator: str | None = field(
        default=None, metadata={"help": "Whose labels are imported, where rows have no column `annotator`."}
    )


def parse(arguments: list[str]) -> tuple[LabelArguments, Given]:
    """Flags over config file.

    Raises:
        ValueError: No pairs, or flags that do not go together.
    """
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--pairs", *arguments]
    recipe, given = FlagParser((LabelArguments,), "label").parse(arguments)
    if recipe.pairs is None:
        raise ValueError("--pairs is missing: a jsonl file with prompt, answer_a and answer_b.")
    if recipe.export and recipe.import_from:
        raise ValueError("--export and --import_from: do one after the other.")
    if recipe.export or recipe.import_from:
        given.refuse(PAGE, "of the page, and none is shown with --export or --import_from. Drop it.")
    if not recipe.export:
        given.refuse(OUT, "of --export, which is not given. Drop it.")
    if not recipe.import_from:
        given.refuse(["annotator"], "of --import_from; on the page annotators say who they are. Drop it.")
    return recipe, given


def labels_of(recipe: LabelArguments) -> Path:
    """The folder of the annotators' files."""
    return Path(recipe.labels) if recipe.labels else Path(str(recipe.pairs)).with_suffix(".labels")


def main(arguments: list[str] | None = None) -> None:
    """Show the page, or export, or import."""
    quiet_libraries()
    recipe, _ = parse(sys.argv[1:] if arguments is None else arguments)
    from trl_ext.feedback.pairs import read_pairs

    pairs, folder = read_pairs(str(recipe.pairs)), labels_of(recipe)
    if recipe.export:
        export(recipe, pairs, folder)
    elif recipe.import_from:
        bring_in(recipe, pairs, folder)
    else:
        show_page(recipe, pairs, folder)


def show_page(recipe: LabelArguments, pairs: list, folder: Path) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        ValueError: A port that is taken, a file of criteria that is not there, labels of another set of pairs.
    """
    from trl_ext.feedback.desk import Desk
    from trl_ext.feedback.page import CRITERIA, serve

    criteria = Path(recipe.criteria) if recipe.criteria else CRITERIA
    if not criteria.is_file():
        raise ValueError(f"--criteria {criteria}: there is no such file.")
    check_output_dir(folder, "--labels")
    desk = Desk(pairs, folder, recipe.seed, recipe.show_skipped, recipe.annotators or ())
    for path in sorted(folder.glob("*.jsonl")):
        view = desk.view(path.stem) if not recipe.annotators or path.stem in recipe.annotators else None
        if view is not None:
            print(f"{path.stem}: {view.progress()}")
    print(f"labels go to {folder.resolve()}; Ctrl-C stops the page")
    text = criteria.read_text(encoding="utf-8")
    serve(desk, text, recipe.host, recipe.port, os.environ.get(TOKEN) or None, lambda line: print(line, flush=True))


def export(recipe: LabelArguments, pairs: list, folder: Path) -> None:
    """Write labelled pairs as preferences."""
    from trl_ext.feedback.exchange import preference_rows
    from trl_ext.feedback.labels import read_labels
    from trl_ext.feedback.pairs import write_rows

    path = Path(str(recipe.export))
    check_output_dir(path.resolve().parent, "--export, whose folder")
    rows, dropped = preference_rows(pairs, read_labels(folder), margin=recipe.margin, min_votes=recipe.min_votes)
    write_rows(path, rows)
    print(f"{len(rows):,} preferences in {path.resolve()}")
    for reason, count in dropped.items():
        print(f"left out, {reason}: {count:,}")
    print(f"train on it      trl-ext reward-model --dataset_name {path} --margin_column strength ...")


def bring_in(recipe: LabelArguments, pairs: list, folder: Path) -> None:
    """Add labels that were made elsewhere."""
    from trl_ext.feedback.exchange import import_labels

    report = import_labels(str(recipe.import_from), pairs, folder, recipe.annotator)
    rows = [(name, f"{count:,}") for name, count in report.written.items()]
    print_table(f"Labels added to {folder.resolve()}", ("annotator", "labels"), rows)
    if report.there:
        print(f"{report.there:,} were there already")
    if report.kept:
        shown = ", ".join(f"row {row} ({pair})" for row, pair in report.kept[:5])
        print(f"{len(report.kept):,} say something else than the label that is there, which stays: {shown}")
