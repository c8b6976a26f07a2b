"""Saving the trained adapter so that peft opens it, with a model card."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from server_app.compose import ComposedRun, RunSettings
from strategies.cohort import identity_order
from strategies.report import RoundReport
from task.backbone import backbone_folder, base_hash, build_backbone, head_name, resolved
from task.config import typed
from task.errors import ConfigError, ModelError
from task.libraries import peft
from task.model import AdaptedModel, canonical_name, with_frozen_factors
from task.units import HEAD, make_layout

KEPT_BY_CLIENTS = "none; pfedla and heur_pfedla alone leave any here, with other strategies clients keep their own"

CARD = """---
library_name: peft
tags: [lora, vision-transformer, federated-learning, flower]
---
# {dataset} with {backbone}, merged by {strategy}

A LoRA adapter (rank {rank}, on {targets}) and a classification head, trained by {rounds} rounds of federated learning
with Petalwise (up to {clients} clients in a round), which all kept their images. Adapter and head together are
{size:,} parameters.

| | |
|---|---|
| backbone | timm `{backbone}` at {image_size} px, arguments `{arguments}`, frozen weights SHA-256 `{base}` |
| its weights | source `{source}` {checkpoint} |
| input | images in [0, 1] less mean {mean}, divided by deviation {std} |
| data | {dataset}, partition {partition} |
| classes | {classes} |
| accuracy on the server's test images | {central} |
| mean accuracy on the clients' own test images | {personal} |
| seed | {seed} |

Open it with Petalwise, which builds the backbone as the run did:

```python
from pathlib import Path
from server_app.saving import open_adapter

model = open_adapter(Path("<the run folder>"))
```

or build that timm model with its weights and {num_classes} outputs yourself and call
`PeftModel.from_pretrained(model, "<this folder>")`. The head comes with it, and stands in `head.safetensors` too. The
whole config is in `../config.yaml`, the metrics per round in `../metrics.jsonl`.
`python -m tools.export <the run folder>` makes forms of it that need no Petalwise.
"""

PERSONAL = """
## Personal models

`personal.safetensors` holds adapter and head of each of these clients: {clients}. `client="{first}"` makes
`open_adapter` open the model of client {first}, and `--client {argument}` makes `tools.export` export it.
"""


def save_adapter(
    folder: Path,
    model: AdaptedModel,
    run: ComposedRun,
    class_names: list[str],
    reports: Sequence[RoundReport],
    evaluated: str = "",
) -> None:
    """Save adapter, head and model card.

    Parameters
    ----------
    folder : Path
        Is made, inside the run folder; ``PeftModel.from_pretrained`` opens it.
    model : AdaptedModel
        Holds the final values.
    run : ComposedRun
        The config, for the card.
    class_names : list[str]
        Names of the classes in order of the head's outputs.
    reports : Sequence[RoundReport]
        Of all rounds so far, at least one, for the card.
    evaluated : str
        What the server's accuracies are of, where that is not the model saved here.
    """
    model.module.save_pretrained(str(folder))
    views = model.layout.views(model.flat.detach().cpu())
    head = {spec.name: views[spec.name].clone() for spec in model.layout.tensors if spec.unit == HEAD}
    save_file(head, folder / "head.safetensors")
    facts = {"base": model.base, "classes": class_names, "strategy": run.choice, "evaluated": evaluated}
    (folder / "petalwise.json").write_text(json.dumps(facts), encoding="utf-8")
    (folder / "README.md").write_text(_card(model, run, class_names, reports, evaluated), encoding="utf-8")


def save_personal(folder: Path, models: Mapping[str, torch.Tensor]) -> None:
    """Save clients' own models beside the adapter, and say so in its card.

    They go into ``personal.safetensors``, as flat values ``client.<name>``.
    """
    if not models:
        return
    save_file({f"client.{name}": flat.contiguous() for name, flat in models.items()}, folder / "personal.safetensors")
    names = sorted(models, key=identity_order)
    with (folder / "README.md").open("a", encoding="utf-8") as card:
        card.write(PERSONAL.format(clients=", ".join(names), first=names[0], argument=shlex.quote(names[0])))


def open_adapter(run_folder: Path, backbones: Path | None = None, client: str = "") -> peft.PeftModel:
    """Open the model that a run has left behind.

    Parameters
    ----------
    run_folder : Path
        The run folder, with ``config.yaml`` and ``adapter/``.
    backbones : Path, optional
        Folder of backbone files; default ``PETALWISE_BACKBONES``.
    client : str
        The client whose personal model it is to be; empty: the global model.

    Returns
    -------
    PeftModel
        Backbone, adapter and head, in evaluation mode.

    Raises
    ------
    PetalwiseError
        If config or backbone cannot be had, the backbone's frozen weights are not those of the run, or there is no
        personal model of that client.
    """
    settings = typed(RunSettings, OmegaConf.load(run_folder / "config.yaml"))
    adapter = run_folder / "adapter"
    num_classes = next(len(tensor) for tensor in load_file(adapter / "head.safetensors").values())
    folder = backbones or backbone_folder({})
    backbone = build_backbone(resolved(settings.backbone), num_classes, folder, settings.seed)
    base = base_hash(backbone)
    model = peft.PeftModel.from_pretrained(backbone, str(adapter)).eval()
    if settings.lora.freeze_a:
        base = with_frozen_factors(base, model)
    wanted = json.loads((adapter / "petalwise.json").read_text(encoding="utf-8"))["base"]
    if base != wanted:
        raise ModelError(
            f"The backbone {settings.backbone.name} here has frozen weights with hash {base[:12]}; the run's had "
            f"{wanted[:12]}, and its adapter is of use with those alone."
        )
    if client:
        _load_personal(model, settings, adapter / "personal.safetensors", client)
    return model


def _load_personal(model: peft.PeftModel, settings: RunSettings, file: Path, client: str) -> None:
    """Overwrite adapter and head by a client's own."""
    saved = load_file(file) if file.is_file() else {}
    models = {name.removeprefix("client."): flat for name, flat in saved.items()}
    if client not in models:
        known = ", ".join(sorted(models, key=identity_order)) or KEPT_BY_CLIENTS
        raise ConfigError(f"There is no personal model of client {client!r}; there are: {known}.")
    own = re.compile(r"\.lora_B\.|modules_to_save" if settings.lora.freeze_a else r"\.lora_[AB]\.|modules_to_save")
    shapes = {canonical_name(name): p.shape for name, p in model.named_parameters() if own.search(name)}
    head = head_name(model.get_base_model())
    layout = make_layout(shapes, settings.lora.units, head)  # type: ignore[arg-type]
    parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, values in layout.views(models[client]).items():
            parameters[name].copy_(values)


def _card(
    model: AdaptedModel, run: ComposedRun, class_names: list[str], reports: Sequence[RoundReport], evaluated: str
) -> str:
    settings, last = run.settings, reports[-1]
    of_what = f" (of {evaluated}, not of the factors saved here)" if evaluated else ""
    accuracy, personal = last.central.get("accuracy"), last.clients_accuracy_mean
    return CARD.format(
        dataset=settings.dataset.name,
        backbone=settings.backbone.name,
        arguments=settings.backbone.arguments,
        checkpoint=f"`{settings.backbone.checkpoint}`" if settings.backbone.checkpoint else "",
        mean=settings.backbone.mean,
        std=settings.backbone.std,
        strategy=run.choice,
        rank=settings.lora.rank,
        targets=", ".join(settings.lora.targets),
        rounds=last.server_round,
        clients=max(len(report.clients_used) for report in reports),
        size=model.layout.size,
        image_size=settings.backbone.image_size,
        source=settings.backbone.source,
        base=model.base,
        partition=settings.partition.kind,
        classes=", ".join(class_names),
        num_classes=len(class_names),
        central="not evaluated" if accuracy is None else f"{100 * accuracy:.2f} %{of_what}",
        personal="not evaluated" if personal is None else f"{100 * personal:.2f} %",
        seed=settings.seed,
    )
