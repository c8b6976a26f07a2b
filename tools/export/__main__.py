"""Export the model that a run has left behind: a peft adapter, a merged timm state dict, ONNX, and a model card.

Run: ``python -m tools.export RUN [--client NAME] [--format peft timm onnx] [--out FOLDER]``. Exits with 1 and the
reason if that cannot be done; nothing is left then.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from task.errors import ConfigError, PetalwiseError
from task.extras import require_extra
from task.folders import without_folders
from tools.export.card import model_card
from tools.export.formats import EXTRA, FORMATS, save_onnx, save_peft, save_timm
from tools.trained import TrainedRun, open_run


def export(run: TrainedRun, folder: Path, formats: Sequence[str] = FORMATS) -> None:
    """Export a model. Its adapter is merged into its weights by that.

    Parameters
    ----------
    run : TrainedRun
        The model.
    folder : Path
        Gets a folder per format, ``classes.json``, ``config.yaml`` and the card ``README.md``; there must be nothing
        in it yet.
    formats : Sequence[str]
        Some of :data:`FORMATS`, in their order.

    Raises
    ------
    ConfigError
        If the folder holds something.
    PetalwiseError
        If something cannot be exported; the folder is not made then.
    """
    difference, classes = 0.0, json.dumps(run.classes, ensure_ascii=False, indent=1)
    config = without_folders((run.folder / "config.yaml").read_text(encoding="utf-8"))
    with _whole(folder) as part:
        if "peft" in formats:
            save_peft(part / "peft", run.model)
        merged = run.model.merge_and_unload()
        if "timm" in formats:
            save_timm(part / "timm", merged)
        if "onnx" in formats:
            difference = save_onnx(part / "onnx", merged, run.settings.backbone, run.classes)
        (part / "classes.json").write_text(f"{classes}\n", encoding="utf-8")
        (part / "config.yaml").write_text(config, encoding="utf-8")
        (part / "README.md").write_text(model_card(run, config, formats, difference), encoding="utf-8")


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Make a folder that is there only when all is in it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{str(folder)!r} holds something already; remove it, or name another folder by --out.")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def default_folder(run: Path, client: str) -> Path:
    """Name the folder of an export in the run folder, one for each client."""
    return run / (f"export-client-{quote(client, safe='')}" if client else "export")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder, such as runs/20261121-201530-livar")
    add("--client", default="", metavar="NAME", help="export this client's personal model")
    add("--format", nargs="+", choices=FORMATS, default=FORMATS, help="what to export (default: all)")
    add("--out", type=Path, metavar="FOLDER", help="default: RUN/export, or RUN/export-client-NAME")
    add("--backbones", type=Path, metavar="DIR", help="folder of backbone files (default: PETALWISE_BACKBONES)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, export, and return the exit code."""
    given = _parser().parse_args(arguments)
    formats = [name for name in FORMATS if name in given.format]
    try:
        if "onnx" in formats:
            require_extra("export", EXTRA)
        run = open_run(given.run, given.backbones, given.client)
        folder = given.out or default_folder(given.run, given.client)
        export(run, folder.expanduser().absolute(), formats)
    except PetalwiseError as error:
        print(f"Nothing is exported: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"Nothing is exported: {error}.", file=sys.stderr)
        return 1
    print(f"{folder}: {', '.join(formats)}, and README.md, which says how each is opened")
    return 0


if __name__ == "__main__":
    sys.exit(main())
