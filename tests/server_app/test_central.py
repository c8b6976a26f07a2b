import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord

from server_app.central import central_evaluation
from server_app.compose import compose_run
from task.data.images import ImageSet
from task.messages import FLAT, flat_to_array
from task.model import build_model


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
