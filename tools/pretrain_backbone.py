"""Pretrain the small ViT that ships with Petalwise, on CIFAR-100.

Run: ``python -m tools.pretrain_backbone DATA --out task/weights/vit_pico.json`` where DATA is a folder
of CIFAR-100 parquet files (columns ``img``, ``fine_label``; names starting with ``train`` and
``test``). Writes the float16 weights without the head, and the seed, recipe and accuracy beside
them. An interrupted run goes on from the last finished epoch.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from torch.nn import functional as F  # noqa: N812

from task.libraries import timm
from task.packaged_weights import write_packaged_weights

ARCHITECTURE = "vit_tiny_patch16_224"
ARGUMENTS = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4}
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def read_split(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a split as uint8 images [n, 3, 32, 32] and int64 labels [n]."""
    files = sorted(str(path) for path in folder.glob(f"{split}*.parquet"))
    table = load_dataset("parquet", data_files=files, split="train").with_format("numpy")
    images = torch.from_numpy(np.stack([np.asarray(image) for image in table["img"]]))
    return images.permute(0, 3, 1, 2).contiguous(), torch.as_tensor(np.asarray(table["fine_label"]))


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
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images classified correctly."""
    model.eval()
    hits = sum(
        (model(normalised(batch)).argmax(1) == target).sum().item()
        for batch, target in zip(images.split(500), labels.split(500), strict=True)
    )
    return hits / len(labels)


def train_epoch(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[torch.Tensor, torch.Tensor],
    epoch: int,
    arguments: argparse.Namespace,
) -> float:
    """Train one epoch under a warm-up and cosine schedule; return the mean loss.

    Half of the patches are dropped but in the last fifth of the epochs: twice the speed, and it regularises.
    """
    images, labels = data
    generator = torch.Generator().manual_seed(arguments.seed * 10_000 + epoch)
    torch.manual_seed(arguments.seed * 10_000 + epoch)
    order = torch.randperm(len(images), generator=generator).split(arguments.batch_size)
    total_steps, warmup = arguments.epochs * len(order), 2 * len(order)
    model.train()
    model.patch_drop.prob = 0.5 if epoch < 0.8 * arguments.epochs else 0.0
    losses = []
    for i, index in enumerate(order):
        step = epoch * len(order) + i
        decay = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, total_steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * min(1.0, (step + 1) / warmup) * decay
        logits = model(normalised(augmented(images[index], generator)))
        loss = F.cross_entropy(logits, labels[index], label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses))


def main() -> None:
    """Train, report the accuracy per epoch, write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    model = timm.create_model(ARCHITECTURE, num_classes=100, patch_drop_rate=0.5, **ARGUMENTS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=arguments.weight_decay, fused=True)
    train, test = read_split(arguments.data, "train"), read_split(arguments.data, "test")
    progress = arguments.out.with_suffix(".partial.pt")
    start = 0
    if progress.exists():
        saved = torch.load(progress, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["epoch"]
    for epoch in range(start, arguments.epochs):
        began = time.perf_counter()
        loss = train_epoch(model, optimizer, train, epoch, arguments)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}, progress)
        seconds = time.perf_counter() - began
        score = accuracy(model, *test)
        print(f"epoch {epoch + 1:3d}/{arguments.epochs}  loss {loss:.3f}  test {score:.4f}  {seconds:.0f} s")

    recipe = {key: value for key, value in vars(arguments).items() if key not in ("data", "out")}
    record = {"data": "CIFAR-100, 25,000 training images", "recipe": recipe, "test_accuracy": accuracy(model, *test)}
    backbone = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    write_packaged_weights(arguments.out, backbone, {"architecture": ARCHITECTURE, "arguments": ARGUMENTS, **record})
    progress.unlink()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
