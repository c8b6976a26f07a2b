"""Make one self-contained HTML page about one or several runs.

Run: ``python -m tools.report RUN [RUN ...] [--out FILE]``. A run that is still going on is shown as far as it
is. Where the data of a run does not come with the app, ``--data`` says where it lies, for the map of who holds which
classes.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported: a report downloads nothing

from task.data.sources import DATA_VARIABLE
from task.errors import PetalwiseError
from tools.report.page import render
from tools.report.reading import read_runs

DEFAULT = Path("runs", "report.html")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, make the page, and say where it is; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, default=DEFAULT, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--data", type=Path, help="folder of the runs' data, as in PETALWISE_DATA")
    given = parser.parse_args(arguments)
    if given.data is not None:
        os.environ[DATA_VARIABLE] = str(given.data)
    try:
        page = render(read_runs(given.runs))
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(page, encoding="utf-8")
    except PetalwiseError as error:
        print(f"No report is made: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"No report is made: {given.out} cannot be written ({error.strerror}).", file=sys.stderr)
        return 1
    print(f"{given.out} ({given.out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
