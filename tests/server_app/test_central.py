from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from server_app.central import central_evaluation
from server_app.compose import compose_run
from strategies.livar.strategy import stacked_products
from task.arrays import FLAT, flat_to_array
from task.data.batches import Normaliser
from task.data.images import ImageSet
from task.evaluation import evaluate as score_of
from task.model import build_model
from task.units import HEAD, lora_layers
from tests.conftest import NUM_CLASSES


def test_evaluates_the_arrays_it_is_given():
    overrides = [
        "backbone=vit_pico_random",
        "backbone.image_size=16",
        "backbone.arguments={patch_size:4,embed_dim:32,depth:2,num_heads:2}",
    ]
    task = compose_run({}, overrides=overrides).settings
    model = build_model(task, num_classes=3)
    images = torch.randint(0, 256, (30, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    evaluate = central_evaluation(model, ImageSet(images, torch.full((30,), 2)), task)

    values = model.read()
    bias = model.layout.views(torch.from_numpy(values))["head.bias"]
    for favoured, accuracy in ((2, 1.0), (0, 0.0)):
        bias[:] = 0
        bias[favoured] = 50.0
        metrics = evaluate(1, ArrayRecord({FLAT: flat_to_array(np.ascontiguousarray(values))}))
        assert metrics["accuracy"] == accuracy
        assert metrics["loss"] == pytest.approx(0.0 if accuracy else 50.0, abs=5.0)
    assert metrics["num-examples"] == 30


SHARES = [0.5, 0.3, 0.2]


def photos():
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.randint(0, NUM_CLASSES, (60,), generator=generator))


def clients_of(model):
    """Three clients' adapters and heads, and a merged model unlike all of them."""
    generator = torch.Generator().manual_seed(3)
    return list(0.3 * torch.randn(4, model.layout.size, generator=generator))


def arrays_of(flat, products):
    added = {name: Array(factor.numpy()) for name, factor in products.items()}
    return ArrayRecord({FLAT: flat_to_array(flat.numpy()), **added})


def dense_score(model, clients, merged, task):
    """Score of the merged head on W0 + scale * sum_m p_m B_m A_m, all layers plain linear ones."""
    with torch.no_grad():
        deltas = []
        for client in clients:
            model.load(client.numpy())
            layers = (model.submodule(layer.name) for layer in lora_layers(model.layout))
            deltas.append([layer.get_delta_weight("default").clone() for layer in layers])
        flat = merged.clone()
        for spec in model.layout.tensors:
            if spec.unit != HEAD:
                flat[spec.offset : spec.offset + spec.size] = 0
        model.load(flat.numpy())
        for index, layer in enumerate(lora_layers(model.layout)):
            weight = model.submodule(layer.name).base_layer.weight
            weight += sum(share * delta[index] for share, delta in zip(SHARES, deltas, strict=True))
    backbone = task.backbone
    return score_of(model, photos(), Normaliser.of(backbone.mean, backbone.std, model.device))


def weights_of(model):
    return {name: value.clone() for name, value in model.module.state_dict().items()}


@pytest.mark.parametrize("freeze_a", [False, True])
def test_products_of_the_clients_stand_in_for_the_adapter_and_leave_no_trace(tiny_task, freeze_a):
    task = replace(tiny_task, lora=replace(tiny_task.lora, freeze_a=freeze_a))
    model = build_model(task, NUM_CLASSES)
    *clients, merged = clients_of(model)
    arrays = arrays_of(merged, stacked_products(clients, SHARES, model.layout))
    assert len(arrays) == 1 + (1 if freeze_a else 2) * len(lora_layers(model.layout))

    evaluate = central_evaluation(model, photos(), task)
    plain = evaluate(1, arrays_of(merged, {}))
    before = weights_of(model)
    found = evaluate(1, arrays)
    for name, value in weights_of(model).items():
        assert torch.equal(value, before[name]), name
    assert evaluate(2, arrays_of(merged, {})) == plain
    assert evaluate(3, arrays) == found

    expected = dense_score(build_model(task, NUM_CLASSES), clients, merged, task)
    assert found["accuracy"] == expected.accuracy
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert abs(found["loss"] - plain["loss"]) > 1e-3


@pytest.mark.parametrize("missing", ["A", "B"])
def test_products_that_are_not_all_there_leave_no_trace_either(tiny_task, missing):
    model = build_model(tiny_task, NUM_CLASSES)
    *clients, merged = clients_of(model)
    products = stacked_products(clients, SHARES, model.layout)
    del products[f"{lora_layers(model.layout)[-1].name}.{missing}"]
    evaluate = central_evaluation(model, photos(), tiny_task)
    evaluate(0, arrays_of(merged, {}))
    before = weights_of(model)
    with pytest.raises(KeyError):
        evaluate(1, arrays_of(merged, products))
    for name, value in weights_of(model).items():
        assert torch.equal(value, before[name]), name
