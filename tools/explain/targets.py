"""The target of every record: learned once, kept in a file, and compared with other ways of weighing."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from strategies.arithmetic import sample_weights
from strategies.livar import lora_merge_weights
from task.backbone import backbone_folder
from task.data.batches import Normaliser
from task.errors import DataError
from task.model import AdaptedModel, build_model
from tools.explain.calibration import ServerImages, server_images
from tools.explain.learning import LearnOptions, learn_weights
from tools.explain.merging import MergedModel
from tools.explain.records import Record, Run

FORMAT = 1
"""Changes where files of targets change their meaning."""


@dataclass(frozen=True, eq=False)
class Target:
    """What was learned of a record."""

    weights: Tensor
    """Weights that sum to one over clients for every layer, float64 [clients, layers]."""
    losses: dict[str, tuple[float, float]]
    """Mean loss (nats) of the merged model on the calibration images and on held-out ones, by way of weighing:
    ``uniform``, ``samples`` (by numbers of examples), ``published`` (the LIVAR paper's table) and ``learned``."""
    images: int
    """Number of calibration images."""


@dataclass(frozen=True)
class TargetStore:
    """Files of targets in a folder, named by what was learned of and how."""

    folder: Path
    """Is made when the first target is kept."""
    options: LearnOptions
    """How targets are learned."""

    def path(self, run: Run, record: Record) -> Path:
        """Name the file by record, config of the run and options; the images are not compared."""
        key = [FORMAT, record.digest, run.config_digest, asdict(self.options)]
        return self.folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.safetensors"

    def read(self, run: Run, record: Record) -> Target | None:
        """Read a target that was learned before, if there is one."""
        path = self.path(run, record)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                found = json.loads(file.metadata()["target"])
                weights = file.get_tensor("weights")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{str(path)!r} is no intact target; delete it, and it is learned anew.") from error
        losses = {way: (calibration, held_out) for way, (calibration, held_out) in found["losses"].items()}
        return Target(weights, losses, found["images"])

    def keep(self, run: Run, record: Record, target: Target) -> None:
        """Write a target, whole or not at all."""
        path = self.path(run, record)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"losses": target.losses, "images": target.images}
        told = {"target": json.dumps(found), "record": record.label, "options": json.dumps(asdict(self.options))}
        unfinished = path.with_suffix(f".{os.getpid()}")
        save_file({"weights": target.weights.contiguous()}, unfinished, told)
        unfinished.replace(path)


class Learner:
    """Learns the targets of one run; its model and images are had when the first is asked for.

    Parameters
    ----------
    run : Run
        The run.
    options : LearnOptions
        How targets are learned.
    device : torch.device
        Where to compute.
    batch_size : int
        Images per forward pass; changes the results by rounding only.
    """

    def __init__(self, run: Run, options: LearnOptions, device: torch.device, batch_size: int) -> None:
        self.run, self.options, self.device, self.batch_size = run, options, device, batch_size

    @cached_property
    def model(self) -> AdaptedModel:
        """The run's model on the device."""
        model = build_model(self.run.settings, self.run.records[0].num_classes, backbone_folder({}))
        model.to(self.device)
        return model

    @cached_property
    def images(self) -> ServerImages:
        """The run's server's images on the device."""
        return server_images(self.run, self.options.calibration_images).to(self.device)

    def learn(self, record: Record, on_step: Callable[[int], None] = lambda step: None) -> Target:
        """Learn the target of a record of the run, and compare its loss with that of known weights.

        Raises
        ------
        PetalwiseError
            If model or images cannot be had, or the loss is not finite.
        """
        backbone, images = self.run.settings.backbone, self.images
        normaliser = Normaliser.of(backbone.mean, backbone.std, self.device)
        updates = record.updates().to(self.device)
        merged = MergedModel(self.model, updates, record.num_examples, normaliser, self.batch_size)
        ways = known_weights(record)
        try:
            learned = learn_weights(merged, ways["uniform"].shape, images.calibration, self.options, on_step)
        except DataError as error:
            raise DataError(f"{record.label}: {error}") from error
        losses = {
            way: (merged.loss(weights, images.calibration), merged.loss(weights, images.held_out))
            for way, weights in (ways | {"learned": learned}).items()
        }
        return Target(learned, losses, len(images.calibration))


def known_weights(record: Record) -> dict[str, Tensor]:
    """Weigh a record's clients in the ways that need no learning; weights float64 [clients, layers]."""
    score_a, score_b = record.signals["score-a"], record.signals["score-b"]
    shares = torch.tensor(sample_weights(record.num_examples), dtype=torch.float64)
    return {
        "uniform": torch.full(score_a.shape, 1 / len(record.clients), dtype=torch.float64),
        "samples": shares[:, None].expand(score_a.shape),
        "published": lora_merge_weights(score_a, score_b),
    }
