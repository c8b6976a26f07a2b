"""Recorded runs of the tiny model without training: the run folder's own code writes what clients might have sent."""

import torch
from flwr.app import ConfigRecord, MetricRecord

from server_app.compose import compose_run
from server_app.run_folder import RunFolder
from strategies.replies import Update
from tools.explain.records import layout_of

TINY = [
    "backbone=vit_pico_random",
    "backbone.image_size=16",
    "backbone.arguments={patch_size:8,embed_dim:16,depth:2,num_heads:2}",
    "lora.rank=2",
    "dataset.max_test_samples=40",
]
CLASSES = 10


def record_run(parent, clients=3, rounds=2, seed=0, overrides=(), edit=lambda server_round, name, signal: signal):
    """Write a run of random updates and signals; ``edit`` may change a client's signals before they are written."""
    composed = compose_run({"strategy": "livar", "seed": seed}, [*TINY, *overrides])
    layout = layout_of(composed.settings, CLASSES)
    folder = RunFolder.new(parent, "livar", composed.yaml)
    generator = torch.Generator().manual_seed(seed)
    for server_round in range(1, rounds + 1):
        received = 0.1 * torch.randn(layout.size, generator=generator)
        updates = [
            random_update(str(client), received, generator, lambda name, s, r=server_round: edit(r, name, s))
            for client in range(clients)
        ]
        folder.record(server_round, received, updates)
    return folder.path


def random_update(name, received, generator, edit=lambda name, signal: signal):
    """An update near the received model, with random signals of 8 layers."""
    signals = {"class-count": torch.full((CLASSES,), 4.0)}
    for signal in ("score-a", "score-b", "norm-a", "norm-b", "norm-product"):
        signals[signal] = torch.rand(8, generator=generator) + 0.01
    signals["label-entropy"] = torch.rand(1, generator=generator)
    flat = received + 0.3 * torch.randn(len(received), generator=generator)
    edited = {name: edit(name, signal) for name, signal in signals.items()}
    examples = int(torch.randint(10, 99, (), generator=generator))
    return Update(name, flat, examples, MetricRecord(), ConfigRecord(), edited)
