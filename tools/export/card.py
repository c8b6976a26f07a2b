"""The model card: how to use what was exported, what it was trained on and how, how good it is, what made it."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from server_app.checkpoints import versions
from strategies.report import RoundReport
from task.errors import DataError, shortened
from task.folders import without_folders
from tools.trained import TrainedRun

MOST_CLASSES = 20
"""So many classes the card itself names."""

CARD = """---
library_name: timm
pipeline_tag: image-classification
tags: [vision-transformer, image-classification, lora, federated-learning, flower]
---
# {dataset} with {backbone}, merged by {strategy}

{what}, trained by {rounds} rounds of federated learning with Petalwise over {clients} clients, which all kept their
images.

## Input

All forms take the same: RGB images in [0, 1], the shorter side resized to {side} px (bicubic) and the middle square cut
out, less the mean, divided by the deviation; float32 [batch, 3, {side}, {side}]. Before that, Petalwise turned images
upright by their EXIF data, put transparent ones over white, and scaled 16 bits per pixel to 8. With a file `image.png`:

```python
from PIL import Image
from timm.data import create_transform

prepare = create_transform({side}, interpolation="bicubic", crop_pct=1.0, mean={mean}, std={std})
images = prepare(Image.open("image.png").convert("RGB")).unsqueeze(0)
```

## Output

Logits [batch, {num_classes}]. `classes.json` names the classes in their order: {classes}.
{uses}
## Training

| | |
|---|---|
{facts}

## Metrics

{metrics}

{last}

## What made it

```bash
{command}
```

made this folder from the run `{run}`; the run itself, on the same data, anew:

```bash
mkdir -p runs/again && cp config.yaml runs/again/
python -m tools.launch . --clients {clients} -c 'resume="runs/again"'
```

`config.yaml` is the whole config of the run:

<details>

```yaml
{config}
```

</details>
"""

USES = {
    "peft": """
## peft

The adapter, its head, and the frozen backbone, to go on from or to keep many adapters for one backbone:

```python
import timm
from peft import PeftModel

backbone = timm.create_model(
    {name},
    checkpoint_path="peft/backbone.safetensors",
    {arguments},
)
model = PeftModel.from_pretrained(backbone, "peft").eval()
logits = model(images)
```
""",
    "timm": """
## timm

The adapter is merged into the weights; Petalwise and peft are not needed:

```python
import timm

model = timm.create_model(
    {name},
    checkpoint_path="timm/model.safetensors",
    {arguments},
).eval()
logits = model(images)
```
""",
    "onnx": """
## ONNX

The same merged model; any number of images at a time. Its metadata hold `classes`, `image_size`, `mean` and `std` as
JSON. On random images its logits differed from torch's by {difference:.1g} at most.

```python
import onnxruntime

session = onnxruntime.InferenceSession("onnx/model.onnx")
[logits] = session.run(["logits"], {{"images": images.numpy()}})
```
""",
}


def model_card(run: TrainedRun, config: str, formats: Sequence[str], difference: float) -> str:
    """Write the card of an export.

    Parameters
    ----------
    run : TrainedRun
        The model and its run.
    config : str
        The run's config as YAML.
    formats : Sequence[str]
        What was exported.
    difference : float
        Largest difference of logits between ONNX and torch.

    Returns
    -------
    str
        Markdown, with front matter.

    Raises
    ------
    DataError
        If the run's ``metrics.jsonl`` cannot be read.
    """
    reports, settings = read_reports(run.folder / "metrics.jsonl"), run.settings
    backbone = settings.backbone
    given = {"num_classes": len(run.classes), "img_size": backbone.image_size, **backbone.arguments}
    arguments = ", ".join(f"{name}={value!r}" for name, value in given.items())
    clients = set().union(*({*r.clients_used, *r.clients_dropped, *r.clients_refused} for r in reports))
    return CARD.format(
        dataset=settings.dataset.name,
        backbone=backbone.name,
        strategy=_strategy(run),
        what=f"The personal model of client `{run.client}`" if run.client else "The model of all clients",
        rounds=reports[-1].server_round,
        clients=len(clients),
        side=backbone.image_size,
        mean=tuple(backbone.mean),
        std=tuple(backbone.std),
        num_classes=len(run.classes),
        classes=shortened(run.classes, MOST_CLASSES),
        uses="".join(
            USES[name].format(name=json.dumps(backbone.name), arguments=arguments, difference=difference)
            for name in formats
        ),
        facts="\n".join(f"| {name} | {value} |" for name, value in _facts(run).items()),
        metrics=_metrics(reports),
        last=_last(run, reports[-1]),
        command=shlex.join(export_command(run, formats)),
        run=run.folder.name,
        config=config.strip(),
    )


def export_command(run: TrainedRun, formats: Sequence[str]) -> list[str]:
    """Give the command that makes an export, with the run by its name alone: a card tells no path of its machine."""
    client = ["--client", run.client] if run.client else []
    return ["python", "-m", "tools.export", f"runs/{run.folder.name}", *client, "--format", *formats]


def read_reports(metrics: Path) -> list[RoundReport]:
    """Read a run's reports by round.

    Raises
    ------
    DataError
        If there are none, or they are none of this version.
    """
    try:
        reports = [RoundReport(**json.loads(line)) for line in metrics.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{metrics.name} of the run cannot be read: {error}.") from error
    if not reports:
        raise DataError(f"{metrics.name} of the run holds no round.")
    return reports


def _strategy(run: TrainedRun) -> str:
    return str(run.facts.get("strategy") or run.settings.strategy["name"])


def _facts(run: TrainedRun) -> dict[str, str]:
    settings = run.settings
    backbone, dataset = settings.backbone, settings.dataset
    checkpoint = f", `{backbone.checkpoint}`" if backbone.checkpoint else ""
    return {
        "backbone": f"timm `{backbone.name}`, weights from `{backbone.source}`{checkpoint}, frozen; SHA-256 of these "
        f"{'and the matrices A ' if settings.lora.freeze_a else ''}`{run.facts['base']}`",
        "adapter": f"LoRA of rank {settings.lora.rank} (alpha {settings.lora.alpha:g}) on "
        f"{', '.join(settings.lora.targets)}; the head is trained whole",
        "data": f"{dataset.name} (source {dataset.source}{f' {dataset.path}' if dataset.path else ''})",
        "partition": _options(asdict(settings.partition)),
        "strategy": _options(settings.strategy),
        "schedule": _options(settings.schedule),
        "privacy": settings.privacy.name,
        "local training": _options(asdict(settings.train)),
        "seed": str(settings.seed),
        "exported with": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={without_folders(str(value))}" for name, value in options.items())


def _metrics(reports: Sequence[RoundReport]) -> str:
    """Tabulate all rounds."""
    lines = [
        "| round | accuracy on the server's test images | mean accuracy of the clients on their own | train loss "
        "| clients merged | dropped |",
        "|---|---|---|---|---|---|",
    ]
    for report in reports:
        central, loss = report.central.get("accuracy"), report.train_loss
        lines.append(
            f"| {report.server_round} | {_percent(central)} | {_percent(report.clients_accuracy_mean)} "
            f"| {'' if loss is None else f'{loss:.4f}'} | {len(report.clients_used)} | {len(report.clients_dropped)} |"
        )
    return "\n".join(lines)


def _last(run: TrainedRun, report: RoundReport) -> str:
    """Say of which model the last accuracies are."""
    if run.client:
        own = report.clients_accuracy.get(run.client)
        found = f"{_percent(own)} in round {report.clients_evaluated_round}" if own is not None else "not evaluated"
        return (
            f"The server's accuracies are of the model of all clients, not of this one. Accuracy of client "
            f"`{run.client}` on its own test images, with the model that it was sent: {found}."
        )
    if of_what := run.facts.get("evaluated"):
        return f"The server's accuracies are of {of_what}, not of the factors exported here."
    return "The server's accuracies are of the model of all clients after the round."


def _percent(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{100 * accuracy:.2f} %"
