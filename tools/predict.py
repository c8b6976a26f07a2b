"""Predict the classes of a folder of images with the model that a run has left behind.

Run: ``python -m tools.predict RUN IMAGES [--client NAME] [--format json] [--out FILE]``. Images in folders inside the
folder count too, hidden ones and files without an image's suffix do not. Exits with 0 if every image was predicted,
with 1 and the reason if nothing could be done, and with 3 if images could not be read; these are named on stderr.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from task.data.batches import Normaliser
from task.data.images import image_decoder, unreadable_reason
from task.data.readers import IMAGE_SUFFIXES, images_in
from task.device import NODE_DEVICES, choose_device, is_device
from task.errors import ConfigError, DataError, PetalwiseError
from tools.trained import TrainedRun, open_run

TOP = 5
"""So many classes are told of every image, or all where there are fewer."""
SKIPPED = 3
"""Exit code where some images could not be read."""


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, or why it could not be read."""

    file: Path
    """The image."""
    classes: tuple[str, ...] = ()
    """Names, the most probable first."""
    probabilities: tuple[float, ...] = ()
    """Their softmax probabilities."""
    unreadable: str = ""
    """Why it could not be read; else empty."""


def predict(run: TrainedRun, files: Sequence[Path], device: torch.device, batch_size: int) -> Iterator[Prediction]:
    """Predict images, decoded and normalised as the run did.

    Parameters
    ----------
    run : TrainedRun
        The model, which is moved to the device.
    files : Sequence[Path]
        Images.
    device : torch.device
        Where to compute.
    batch_size : int
        Images per forward pass; so many are in memory at a time.

    Yields
    ------
    Prediction
        One for every file; within a batch those that could not be read come first, the others in their order.
    """
    backbone = run.settings.backbone
    run.model.to(device)
    normaliser, decode_one = Normaliser.of(backbone.mean, backbone.std, device), image_decoder(backbone.image_size)
    for start in range(0, len(files), batch_size):
        decoded = {}
        for file in files[start : start + batch_size]:
            try:
                decoded[file] = decode_one({"bytes": None, "path": str(file)})
            except Exception as error:  # Pillow's decoders raise dozens of unrelated types on broken files
                yield Prediction(file, unreadable=unreadable_reason(error))
        if decoded:
            images = torch.from_numpy(np.stack(list(decoded.values()))).to(device)
            yield from _top(run, list(decoded), normaliser(images))


@torch.inference_mode()
def _top(run: TrainedRun, files: Sequence[Path], images: torch.Tensor) -> list[Prediction]:
    classes = run.classes
    top = run.model(images).softmax(1).topk(min(TOP, len(classes)))
    return [
        Prediction(file, tuple(classes[code] for code in codes), tuple(probabilities))
        for file, codes, probabilities in zip(files, top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def write_csv(rows: Iterable[dict[str, Any]], columns: Sequence[str], file: TextIO) -> None:
    """Write rows as they come."""
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def write_json(rows: Iterable[dict[str, Any]], columns: Sequence[str], file: TextIO) -> None:
    """Write a list of objects, one a line, whose keys are the columns."""
    file.write("[")
    for number, row in enumerate(rows):
        file.write((",\n" if number else "\n") + json.dumps(row, ensure_ascii=False))
    file.write("\n]\n")


WRITERS = {"csv": write_csv, "json": write_json}
"""How predictions are written, by the name of the format."""


def predict_folder(
    run: TrainedRun, folder: Path, out: Path | None, kind: str, device: torch.device, batch_size: int
) -> int:
    """Predict all images of a folder and write what was found; progress and unreadable images are told on stderr.

    Parameters
    ----------
    run : TrainedRun
        The model.
    folder : Path
        Folder of images.
    out : Path or None
        File of the predictions, which is there only when it is whole; None: standard output.
    kind : str
        One of :data:`WRITERS`.
    device : torch.device
        Where to compute.
    batch_size : int
        Images per forward pass.

    Returns
    -------
    int
        Number of images that could not be read.

    Raises
    ------
    DataError
        If there is no image.
    """
    files, skipped, top = _images(folder), 0, min(TOP, len(run.classes))
    columns = ["file", *(f"{name}_{rank + 1}" for name in ("class", "probability") for rank in range(top))]

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal skipped
        for prediction in predict(run, files, device, batch_size):
            name = prediction.file.relative_to(folder).as_posix()
            if prediction.unreadable:
                skipped += 1
                progress.console.print(
                    f"{name}: {prediction.unreadable}", markup=False, highlight=False, soft_wrap=True
                )
            else:
                probabilities = (round(probability, 6) for probability in prediction.probabilities)
                yield dict(zip(columns, (name, *prediction.classes, *probabilities), strict=True))
            progress.advance(task)

    with _output(out) as file, _progress(quiet=out is None and sys.stdout.isatty()) as progress:
        task = progress.add_task("images", total=len(files))
        WRITERS[kind](rows(), columns, file)
    if skipped:
        print(f"{skipped} of {len(files)} images could not be read and are left out.", file=sys.stderr)
    return skipped


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"There is no folder {str(folder)!r}; IMAGES must be a folder of images.")
    if files := images_in(folder):
        return files
    suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
    raise DataError(f"{str(folder)!r} holds no images: no file with one of the suffixes {suffixes}.")


def _progress(*, quiet: bool) -> Progress:
    """Make a bar on stderr, if a person is looking and does not see the rows themselves."""
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    return Progress(*columns, console=console, redirect_stdout=False, disable=quiet or not console.is_terminal)


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("w", newline="", encoding="utf-8") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder, such as runs/20261121-201530-livar")
    add("images", type=Path, metavar="IMAGES", help="folder of images")
    add("--client", default="", metavar="NAME", help="predict with this client's personal model")
    add("--format", choices=sorted(WRITERS), default="csv", help="of the predictions (default: csv)")
    add("--out", type=Path, metavar="FILE", help="where they go (default: standard output)")
    add("--batch-size", type=int, default=64, metavar="N", help="images per forward pass (default: 64)")
    add("--device", default="auto", help=f"{NODE_DEVICES} (default: auto)")
    add("--backbones", type=Path, metavar="DIR", help="folder of backbone files (default: PETALWISE_BACKBONES)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, predict, and return the exit code."""
    given = _parser().parse_args(arguments)
    try:
        if given.batch_size < 1:
            raise ConfigError(f"--batch-size is {given.batch_size}; it must be at least 1.")
        if not is_device(given.device):
            raise ConfigError(f"--device is {given.device!r}; it may be {NODE_DEVICES}.")
        device = choose_device(given.device)
        run = open_run(given.run, given.backbones, given.client)
        skipped = predict_folder(run, given.images, given.out, given.format, device, given.batch_size)
    except PetalwiseError as error:
        print(f"Nothing is predicted: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"Nothing is predicted: {error}.", file=sys.stderr)
        return 1
    return SKIPPED if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
