"""What LIVAR's signals cost a client: the same local training with and without them, in turn, as paired ratios.

Run: ``python -m benchmarks.signals`` (any Hydra overrides; ``--images``, ``--pairs``, ``--json FILE``).
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.speed.ratios import seconds_of
from client_app.measuring import Recorder, last_epoch_start
from client_app.training import make_optimizer, train
from server_app.compose import compose_run
from strategies.livar import Livar
from task.backbone import backbone_folder, resolved
from task.config import TaskConfig
from task.data.batches import Normaliser, train_batches
from task.data.images import ImageSet
from task.device import choose_device
from task.model import AdaptedModel, build_model
from task.signals import NOTHING, SignalRequest

AIM = 0.02
APP = Path(__file__).resolve().parents[1]


class Client:
    """One client's training, repeatable from the same received values.

    Parameters
    ----------
    task : TaskConfig
        Model and training.
    num_images, num_classes : int
        Random images and labels to train on; their content plays no part in the time.
    """

    def __init__(self, task: TaskConfig, num_images: int, num_classes: int) -> None:
        self.task = task
        self.model: AdaptedModel = build_model(task, num_classes, backbone_folder({}))
        device = choose_device(task.train.device)
        self.model.to(device)
        self.received = self.model.read()
        self.optimizer = make_optimizer(self.model, task.train)
        self.normaliser = Normaliser.of(task.backbone.mean, task.backbone.std, device)
        generator, side = torch.Generator().manual_seed(0), task.backbone.image_size
        images = torch.randint(0, 256, (num_images, 3, side, side), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, num_classes, (num_images,), generator=generator)
        self.data = ImageSet(images, labels).to(device)

    def seconds(self, request: SignalRequest) -> float:
        """Train one round and, if asked, pack the signals; returns the seconds of it, on a CPU of processor time."""
        self.model.load(self.received)
        options, generator = self.task.train, torch.Generator().manual_seed(1)
        batches = train_batches(
            self.data,
            options.batch_size,
            options.local_epochs,
            options.max_steps,
            options.augment,
            self.normaliser,
            generator,
        )

        def measured_round() -> None:
            with Recorder(request, self.model, self.optimizer, last_epoch_start(len(self.data), options)) as recorder:
                train(self.model, self.optimizer, batches, recorder=recorder)
            if request.anything:
                recorder.signals(self.data, self.normaliser, generator)

        return seconds_of(measured_round, self.model.device)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure pairs and print the overhead's median, minimum and maximum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as backbone=dinov2_small_file")
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--json", type=Path, default=APP / "runs" / "bench" / "signals.json")
    arguments = parser.parse_args(argv)
    settings = compose_run({"strategy": "livar"}, ["train.local_epochs=1", *arguments.overrides]).settings
    settings.backbone = resolved(settings.backbone)
    client, livar = Client(settings, arguments.images, arguments.classes), Livar().request()
    client.seconds(livar)
    ratios, fastest = [], dict.fromkeys((NOTHING, livar), float("inf"))
    for pair in range(arguments.pairs):
        order = (NOTHING, livar) if pair % 2 else (livar, NOTHING)
        taken = {request: client.seconds(request) for request in order}
        fastest = {request: min(best, taken[request]) for request, best in fastest.items()}
        ratios.append(taken[livar] / taken[NOTHING] - 1)
        print(f"pair {pair + 1}: off {taken[NOTHING]:.3f} s, on {taken[livar]:.3f} s, {100 * ratios[-1]:+.2f} %")
    result = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    result["of the fastest"] = fastest[livar] / fastest[NOTHING] - 1
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"signals_overhead": result, "overrides": arguments.overrides}, indent=1))
    shown = ", ".join(f"{name} {100 * value:+.2f} %" for name, value in result.items())
    print(f"{settings.backbone.name}, {torch.get_num_threads()} threads: signals cost {shown} of the training time")
    print(f"At most {100 * AIM:.0f} % in the median: {'yes' if result['median'] <= AIM else 'no'}")


if __name__ == "__main__":
    main()
