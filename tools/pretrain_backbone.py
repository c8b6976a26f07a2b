"""Pretrain the small ViT that ships with Petalwise, on CIFAR-100.

Run: ``python -m tools.pretrain_backbone DATA --out task/weights/vit_pico.json`` where DATA is a folder
of CIFAR-100 parquet files (columns ``img``, ``fine_label``; names starting with ``train`` and
``test``). Writes the float16 weights without the head, and the seed, recipe and accuracy beside
them. An interrupted run goes on from the last finished epoch if recipe and data are the same.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from task.config import DatasetConfig
from task.data.images import ImageSet, decode
from task.data.sources import load_split
from task.errors import ConfigError, PetalwiseError
from task.libraries import timm
from task.packaged_weights import write_packaged_weights

ARCHITECTURE = "vit_tiny_patch16_224"
ARGUMENTS: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4}
NUM_CLASSES = 100
CIFAR100 = DatasetConfig(name="CIFAR-100", source="parquet", image_column="img", label_column="fine_label")


def read_images(folder: Path, role: Literal["train", "test"]) -> ImageSet:
    """Read a split as uint8 images [n, 3, 32, 32] and int64 labels [n]."""
    return decode(load_split(CIFAR100, role, folder, seed=0), ARGUMENTS["img_size"])


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift by up to 4 pixels and flip, each image by its own draw."""
    n = len(images)
    padded = F.pad(images, (4, 4, 4, 4))
    offset = torch.randint(0, 9, (n, 2), generator=generator)
    rows = offset[:, :1] + torch.arange(32)
    columns = offset[:, 1:] + torch.arange(32)
    flip = torch.rand(n, generator=generator) < 0.5
    columns[flip] = columns[flip].flip(1)
    index = torch.arange(n)
    return padded[index[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def normalised(images: torch.Tensor) -> torch.Tensor:
    """Map uint8 images to float32 with mean 0.5 and deviation 0.5 per channel."""
    return images.float().div_(127.5).sub_(1.0)


@torch.inference_mode()
def accuracy(model: torch.nn.Module, test: ImageSet) -> float:
    """Share of images classified correctly."""
    model.eval()
    hits = sum(
        (model(normalised(batch)).argmax(1) == target).sum().item()
        for batch, target in zip(test.images.split(500), test.labels.split(500), strict=True)
    )
    return float(hits / len(test))


def train_epoch(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    data: ImageSet,
    epoch: int,
    arguments: argparse.Namespace,
) -> float:
    """Train one epoch under a warm-up and cosine schedule; return the mean loss.

    Half of the patches are dropped but in the last fifth of the epochs: twice the speed, and it regularises.
    """
    generator = torch.Generator().manual_seed(arguments.seed * 10_000 + epoch)
    torch.manual_seed(arguments.seed * 10_000 + epoch)
    order = torch.randperm(len(data), generator=generator).split(arguments.batch_size)
    total_steps, warmup = arguments.epochs * len(order), 2 * len(order)
    model.train()
    patch_drop: Any = model.patch_drop
    patch_drop.prob = 0.5 if epoch < 0.8 * arguments.epochs else 0.0
    losses = []
    for i, index in enumerate(order):
        step = epoch * len(order) + i
        decay = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, total_steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * min(1.0, (step + 1) / warmup) * decay
        logits = model(normalised(augmented(data.images[index], generator)))
        loss = F.cross_entropy(logits, data.labels[index], label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses))


class Progress:
    """What an interrupted run goes on from: model, optimizer and epoch, with the recipe that they belong to.

    Parameters
    ----------
    path : Path
        The file; it is replaced in one step, so that an interruption leaves the one before.
    recipe : dict
        Options and size of the data; progress made under others is refused.
    """

    def __init__(self, path: Path, recipe: dict[str, Any]) -> None:
        self.path = path
        self.recipe = recipe

    def load(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Restore model and optimizer if there is progress; return how many epochs are done."""
        if not self.path.exists():
            return 0
        saved = torch.load(self.path, weights_only=True)
        if saved.get("recipe") != self.recipe:
            raise ConfigError(
                f"{self.path} was left by a run with another recipe ({saved.get('recipe')}, not {self.recipe}): "
                "remove it, or give that run's options."
            )
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return int(saved["epoch"])

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        """Keep the state after `epoch` epochs."""
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
        fresh = self.path.with_name(f"{self.path.name}.new")
        torch.save({**state, "recipe": self.recipe}, fresh)
        os.replace(fresh, self.path)


def pretrain(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, say the accuracy after each epoch, write the weights; return what is written beside them."""
    recipe = {key: value for key, value in vars(arguments).items() if key not in ("data", "out")}
    torch.manual_seed(arguments.seed)
    model = timm.create_model(ARCHITECTURE, num_classes=NUM_CLASSES, patch_drop_rate=0.5, **ARGUMENTS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=arguments.weight_decay, fused=True)
    train, test = read_images(arguments.data, "train"), read_images(arguments.data, "test")
    progress = Progress(arguments.out.with_suffix(".partial.pt"), {**recipe, "training_images": len(train)})
    for epoch in range(progress.load(model, optimizer), arguments.epochs):
        began = time.perf_counter()
        loss = train_epoch(model, optimizer, train, epoch, arguments)
        progress.save(model, optimizer, epoch + 1)
        seconds = time.perf_counter() - began
        score = accuracy(model, test)
        print(f"epoch {epoch + 1:3d}/{arguments.epochs}  loss {loss:.3f}  test {score:.4f}  {seconds:.0f} s")

    images = f"{CIFAR100.name}, {len(train):,} training images"
    record = {"data": images, "recipe": recipe, "test_accuracy": accuracy(model, test)}
    backbone = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    fresh = arguments.out.with_name(f"{arguments.out.name}.new")
    write_packaged_weights(fresh, backbone, {"architecture": ARCHITECTURE, "arguments": ARGUMENTS, **record})
    os.replace(fresh, arguments.out)
    progress.path.unlink(missing_ok=True)
    return record


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options and pretrain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    try:
        print(json.dumps(pretrain(parser.parse_args(argv))))
    except PetalwiseError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
