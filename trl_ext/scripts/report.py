"""A page about one run, or about several beside each other: curves, alarms, before and after, samples, configuration.

    trl-ext report runs/toy
    trl-ext report runs/a runs/b --output comparison.html

A run is the output_dir of a training. The page is one HTML file that needs no network. A training writes its own when
it ends, so this is for several runs, for one that goes on, and for one that was killed.
"""

import argparse
import sys
from pathlib import Path

ONE, SEVERAL = "report.html", "comparison.html"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Folders of runs, and where the page goes."""
    parser = argparse.ArgumentParser(
        prog="trl-ext report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a training")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=f"The page. Default: {ONE} in the folder of the run; of several, {SEVERAL} here.",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Write the page, and say where it is; exit status 1 and one line where a run cannot be read."""
    given = parse(sys.argv[1:] if arguments is None else arguments)
    from trl_ext.report.page import write_page

    output = Path(given.output or (Path(given.runs[0]) / ONE if len(given.runs) == 1 else SEVERAL))
    if given.output and (output.is_dir() or not output.parent.is_dir()):
        raise SystemExit(f"--output {output}: name a file in a folder that there is.")
    try:
        path = write_page(given.runs, output)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    print(f"{path.resolve()}, {path.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
