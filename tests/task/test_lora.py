"""The lean LoRA layer against peft's own, on the same values."""

import copy
from dataclasses import replace

import pytest
import torch

from task.backbone import build_backbone
from task.config import LoraConfig
from task.lora import LeanLoraLinear, Linear, make_lean
from task.model import add_adapter, build_model

NUM_CLASSES = 5


@pytest.fixture
def pair(tiny_task):
    """peft's model and the lean one, the adapter's B not zero."""
    task = replace(tiny_task, lora=LoraConfig(rank=4, alpha=6.0))
    peft_model = add_adapter(build_backbone(task.backbone, NUM_CLASSES, None, 0), task.lora, 0)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in peft_model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    lean = copy.deepcopy(peft_model)
    make_lean(lean)
    return peft_model, lean


def layers(model):
    return [module for module in model.modules() if isinstance(module, Linear)]


def test_every_adapted_layer_is_lean_and_still_pefts(pair):
    _, lean = pair
    assert len(layers(lean)) == 8
    assert all(type(layer) is LeanLoraLinear for layer in layers(lean))


def test_logits_and_gradients_are_those_of_peft(pair, images):
    labels, gradients, logits = torch.arange(len(images)) % NUM_CLASSES, [], []
    for model in pair:
        model.train()
        logits.append(model(images))
        torch.nn.functional.cross_entropy(logits[-1], labels).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-7)


def test_the_derivative_is_the_functions_own(pair):
    """Against finite differences in float64, the input's gradient included."""
    layer = copy.deepcopy(layers(pair[1])[0]).double()
    x = torch.randn(2, 3, layer.in_features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight

    def of_factors(new_a, new_b):
        values = {"lora_A.default.weight": new_a, "lora_B.default.weight": new_b}
        return torch.func.functional_call(layer, values, (x.detach(),))

    assert torch.autograd.gradcheck(of_factors, (a, b))


def test_disabled_and_merged_adapters_are_left_to_peft(pair, images):
    peft_model, lean = (model.eval() for model in pair)
    with torch.no_grad(), peft_model.disable_adapter(), lean.disable_adapter():
        assert torch.equal(lean(images), peft_model(images))
    with torch.no_grad():
        adapted = lean(images)
        lean.merge_adapter()
        torch.testing.assert_close(lean(images), adapted, rtol=1e-4, atol=1e-5)
        lean.unmerge_adapter()
        torch.testing.assert_close(lean(images), adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [LoraConfig(rank=4, dropout=0.1), LoraConfig(rank=4, freeze_a=True)])
def test_what_the_lean_layer_does_not_know_stays_pefts(tiny_task, lora):
    model = build_model(replace(tiny_task, lora=lora), NUM_CLASSES).module
    assert {type(layer) for layer in layers(model)} == {Linear}


def test_the_output_may_be_changed_in_place_and_a_batch_may_be_empty(pair):
    layer = layers(pair[1])[0]
    x = torch.randn(2, 3, layer.in_features, requires_grad=True)
    torch.relu_(layer(x)).sum().backward()
    assert x.grad is not None
    assert layer(x[:0]).shape == (0, 3, layer.out_features)


def test_mixed_precision_and_single_vectors_are_left_to_peft(pair):
    plain, lean = (layers(model)[0] for model in pair)
    x = torch.randn(2, 3, lean.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        assert lean(x).dtype == torch.bfloat16
        assert torch.equal(lean(x), plain(x))
    assert torch.equal(lean(x[0, 0]), plain(x[0, 0]))
