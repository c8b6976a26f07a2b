"""A client's training step against a hand-written LoRA step, and what it consists of."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.agreement import check_same
from benchmarks.speed.ratios import Ratio, in_turn, seconds_of
from benchmarks.speed.results import Found, Table
from benchmarks.speed.settings import TWO_PHASES, Setting
from client_app.training import make_optimizer, train
from task.backbone import build_backbone
from task.config import TaskConfig
from task.data.batches import Normaliser, train_batches
from task.data.images import ImageSet
from task.model import add_adapter, build_model, canonical_name

NUM_CLASSES = 10
TARGET = 0.95
PAIRS = 5
"""Measurements of each arm, times the repetitions."""
STEPS = {"overhead_bound": 5, "compute_bound": 1}
"""Steps of one measurement."""
GEMMS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::mkldnn_convolution")
SHOWN = 8
"""How many operators the profile lists."""


class HandLora(nn.Module):
    """A LoRA layer as one writes it by hand: x W^T + b + s (x A^T) B^T."""

    def __init__(self, layer: nn.Linear, a: Tensor, b: Tensor, scaling: float) -> None:
        super().__init__()
        self.layer, self.a, self.b, self.scaling = layer, nn.Parameter(a), nn.Parameter(b), scaling

    def forward(self, x: Tensor) -> Tensor:
        """Apply the frozen layer and the adapter."""
        out: Tensor = self.layer(x) + F.linear(F.linear(x, self.a) * self.scaling, self.b)
        return out


class Client:
    """Images of one client, and the batches of a round of them.

    Parameters
    ----------
    task : TaskConfig
        Model and training.
    device : torch.device or str, default "cpu"
        Where images and batches lie.
    """

    def __init__(self, task: TaskConfig, device: torch.device | str = "cpu") -> None:
        self.task, side = task, task.backbone.image_size
        self.normaliser = Normaliser.of(task.backbone.mean, task.backbone.std, device)
        generator, count = torch.Generator().manual_seed(0), task.train.max_steps * task.train.batch_size
        images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
        self.data = ImageSet(images, torch.randint(0, NUM_CLASSES, (count,), generator=generator)).to(device)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of a round, the same every time."""
        options, generator = self.task.train, torch.Generator().manual_seed(1)
        return train_batches(
            self.data, options.batch_size, 1, options.max_steps, options.augment, self.normaliser, generator
        )


def app_arm(client: Client) -> tuple[Callable[[], object], Callable[[], dict[str, Tensor]]]:
    """Make the app's training of a round, and what reads the adapter after it."""
    model = build_model(client.task, NUM_CLASSES)
    initial, optimizer = model.read(), make_optimizer(model, client.task.train)

    def run() -> None:
        model.load(initial)
        train(model, optimizer, client.batches())

    return run, lambda: {name: value.clone() for name, value in model.layout.views(model.flat.detach()).items()}


def plain_arm(client: Client, hand_written: bool) -> tuple[Callable[[], object], Callable[[], dict[str, Tensor]]]:
    """Make a plain loop over peft's own model, or over one with hand-written LoRA layers."""
    task = client.task
    backbone = build_backbone(task.backbone, NUM_CLASSES, None, task.seed)
    module: nn.Module = add_adapter(backbone, task.lora, task.seed)
    named = {canonical_name(name): p for name, p in module.named_parameters() if p.requires_grad}
    if hand_written:
        module, named = by_hand(module, named)
    initial = {name: parameter.detach().clone() for name, parameter in named.items()}

    def run() -> None:
        for name, parameter in named.items():
            parameter.data.copy_(initial[name])
        optimizer = torch.optim.AdamW(
            named.values(), lr=task.train.lr, weight_decay=task.train.weight_decay, fused=True
        )
        module.train()
        for images, labels in client.batches():
            optimizer.zero_grad()
            F.cross_entropy(module(images), labels).backward()
            optimizer.step()

    return run, lambda: {name: parameter.detach().clone() for name, parameter in named.items()}


def by_hand(module: Any, named: dict[str, nn.Parameter]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Take peft's layers out of a model, hand-written ones with the same values in their place."""
    model, found = module.base_model.model, dict(named)
    for name in [name.removesuffix(".lora_A.weight") for name in named if name.endswith(".lora_A.weight")]:
        layer = model.get_submodule(name)
        a, b = named[f"{name}.lora_A.weight"], named[f"{name}.lora_B.weight"]
        hand = HandLora(layer.base_layer, a.detach().clone(), b.detach().clone(), layer.scaling["default"])
        found |= {f"{name}.lora_A.weight": hand.a, f"{name}.lora_B.weight": hand.b}
        model.set_submodule(name, hand)
    return model, found


def step_task(setting: Setting) -> TaskConfig:
    """Return a setting's task with as many steps as one measurement has."""
    task = setting.compose().settings
    return replace(task, train=replace(task.train, max_steps=STEPS[setting.name]))


def step_seconds(client: Client, pairs: int) -> dict[str, list[float]]:
    """Measure all arms in turn, and check that they train the same adapter.

    Returns
    -------
    dict[str, list[float]]
        Seconds of each measurement by arm: ``hand``, ``peft``, ``app``.

    Raises
    ------
    PetalwiseError
        If the adapters differ.
    """
    arms = {"hand": plain_arm(client, True), "peft": plain_arm(client, False), "app": app_arm(client)}
    taken = in_turn([partial(seconds_of, run) for run, _ in arms.values()], pairs)
    for _, read in arms.values():
        check_same(read(), arms["hand"][1]())
    return dict(zip(arms, taken, strict=True))


def profile_table(setting: Setting, client: Client) -> Table:
    """List the operators that take most of the app's step, as shares of all operators' own time."""
    run, _ = app_arm(client)
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    events: Any = profiler.key_averages()
    own = {event.key: event.self_cpu_time_total for event in events}
    total = sum(own.values())
    largest = sorted(own, key=lambda key: -own[key])[:SHOWN]
    rows = [["all matrix products", f"{100 * sum(own.get(key, 0.0) for key in GEMMS) / total:.1f} %"]]
    rows += [[f"`{key}`", f"{100 * own[key] / total:.1f} %"] for key in largest]
    return Table(f"A training step by operator: {setting.shown}", ["operator", "share of the step"], rows)


def measure(repeats: int) -> Found:
    """Measure the step of both settings in one thread, as simulated clients train."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratios, tables = {}, []
        for setting in TWO_PHASES:  # a step is the same in one
            client = Client(step_task(setting))
            by_arm = step_seconds(client, pairs=PAIRS * repeats)
            for key, arm, target in (("lora_step_efficiency", "app", TARGET), ("peft_step_efficiency", "peft", None)):
                ratios[f"{key}.{setting.name}"] = Ratio.between(by_arm["hand"], by_arm[arm], target)
            tables.append(profile_table(setting, client))
        return Found(ratios, tables)
    finally:
        torch.set_num_threads(threads)
