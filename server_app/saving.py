"""Saving the trained adapter so that peft opens it, with a model card."""

from pathlib import Path

from safetensors.torch import save_file

from server_app.compose import ComposedRun
from strategies.report import RoundReport
from task.model import AdaptedModel
from task.units import HEAD

CARD = """---
library_name: peft
tags: [lora, vision-transformer, federated-learning, flower]
---
# {dataset} with {backbone}, merged by {strategy}

A LoRA adapter (rank {rank}, on {targets}) and a classification head, trained by {rounds} rounds of federated learning
with Petalwise ({clients} clients in the last round), which all kept their images. Adapter and head together are
{size:,} parameters.

| | |
|---|---|
| backbone | timm `{backbone}` at {image_size} px, source `{source}`, frozen weights SHA-256 `{base}` |
| data | {dataset}, partition {partition} |
| classes | {classes} |
| accuracy on the server's test images | {central} |
| mean accuracy on the clients' own test images | {personal} |
| seed | {seed} |

Open it: build the same timm model (with the head's {num_classes} outputs) and
`PeftModel.from_pretrained(model, "<this folder>")`; the head comes with it, and stands in `head.safetensors` too.
The whole config is in `../config.yaml`, the metrics per round in `../metrics.jsonl`.
"""


def save_adapter(
    folder: Path, model: AdaptedModel, run: ComposedRun, class_names: list[str], last: RoundReport
) -> None:
    """Save adapter, head and model card.

    Parameters
    ----------
    folder : Path
        Is made; ``PeftModel.from_pretrained`` opens it.
    model : AdaptedModel
        Holds the final values.
    run : ComposedRun
        The config, for the card.
    class_names : list[str]
        Names of the classes in order of the head's outputs.
    last : RoundReport
        Of the last round, for the card.
    """
    model.module.save_pretrained(str(folder))
    views = model.layout.views(model.flat.detach().cpu())
    head = {spec.name: views[spec.name].clone() for spec in model.layout.tensors if spec.unit == HEAD}
    save_file(head, folder / "head.safetensors")
    (folder / "README.md").write_text(_card(model, run, class_names, last), encoding="utf-8")


def _card(model: AdaptedModel, run: ComposedRun, class_names: list[str], last: RoundReport) -> str:
    settings = run.settings
    accuracy, personal = last.central.get("accuracy"), last.clients_accuracy_mean
    return CARD.format(
        dataset=settings.dataset.name,
        backbone=settings.backbone.name,
        strategy=run.strategy.name,
        rank=settings.lora.rank,
        targets=", ".join(settings.lora.targets),
        rounds=settings.num_server_rounds,
        clients=len(last.clients_used),
        size=model.layout.size,
        image_size=settings.backbone.image_size,
        source=settings.backbone.source,
        base=model.base,
        partition=settings.partition.kind,
        classes=", ".join(class_names),
        num_classes=len(class_names),
        central="not evaluated" if accuracy is None else f"{100 * accuracy:.2f} %",
        personal="not evaluated" if personal is None else f"{100 * personal:.2f} %",
        seed=settings.seed,
    )
