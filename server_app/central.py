"""Evaluation of the global model on the server's own test images."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from flwr.app import ArrayRecord, MetricRecord

from task.arrays import FLAT, array_to_flat
from task.config import TaskConfig
from task.data.batches import Normaliser
from task.data.images import ImageSet
from task.evaluation import evaluate
from task.model import AdaptedModel
from task.units import lora_layers


def central_evaluation(
    model: AdaptedModel, test: ImageSet, task: TaskConfig
) -> Callable[[int, ArrayRecord], MetricRecord]:
    """Make the function that a strategy calls to evaluate the global model on the server.

    Parameters
    ----------
    model : AdaptedModel
        Built once; every call copies the global values into it.
    test : ImageSet
        The server's test images.
    task : TaskConfig
        For the backbone's normalisation.

    Returns
    -------
    callable
        Maps (server round, arrays) to accuracy in [0, 1] and mean loss. With arrays ``<layer>.A`` and
        ``<layer>.B`` beside the flat one, their products stand in for the adapter's.
    """
    normaliser = Normaliser.of(task.backbone.mean, task.backbone.std, model.device)
    images = test.to(model.device)

    def evaluate_round(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load(array_to_flat(arrays[FLAT], model.layout.size))
        with _products(model, arrays) if len(arrays) > 1 else nullcontext():
            score = evaluate(model, images, normaliser)
        return MetricRecord({"accuracy": score.accuracy, "loss": score.loss, "num-examples": score.num_examples})

    return evaluate_round


@contextmanager
def _products(model: AdaptedModel, arrays: ArrayRecord) -> Iterator[None]:
    """Put sum_m w_m B_m A_m into the frozen weights, in place of the adapter's product, and take it out again."""
    kept: dict[str, torch.Tensor] = {}
    adapter = model.flat.detach().clone()
    views = model.layout.views(model.flat.detach())
    try:
        for layer in lora_layers(model.layout):
            module = model.submodule(layer.name)
            weight = module.base_layer.weight.data
            kept[layer.name] = weight.clone()
            b = torch.from_numpy(arrays[f"{layer.name}.B"].numpy()).to(weight.device)
            a = module.lora_A["default"].weight.data if layer.a is None else None
            a = torch.from_numpy(arrays[f"{layer.name}.A"].numpy()).to(weight.device) if a is None else a
            weight.addmm_(b, a, alpha=module.scaling["default"])
            views[layer.b.name].zero_()
        yield
    finally:
        for name, weight in kept.items():
            model.submodule(name).base_layer.weight.data.copy_(weight)
        model.flat.detach().copy_(adapter)
