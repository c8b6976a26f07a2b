"""The adapted model: one flat array under all trainable tensors, a reproducible start, a frozen backbone."""

import copy
import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, interpolate

from task.backbone import build_backbone
from task.config import BackboneConfig, task_to_json
from task.errors import ModelError
from task.model import build_model, canonical_name
from task.units import HEAD
from tests.conftest import NUM_CLASSES


def trainable(model):
    return {canonical_name(name): p for name, p in model.module.named_parameters() if p.requires_grad}


def assert_aliases(model):
    """Every trainable tensor and its gradient lie where the layout says, in ``flat`` and ``flat.grad``."""
    assert set(trainable(model)) == {spec.name for spec in model.layout.tensors}
    for spec in model.layout.tensors:
        parameter = trainable(model)[spec.name]
        assert parameter.shape == spec.shape
        assert parameter.data_ptr() == model.flat.data_ptr() + 4 * spec.offset
        assert parameter.grad.data_ptr() == model.flat.grad.data_ptr() + 4 * spec.offset
        assert parameter.is_contiguous()
        assert parameter.grad.is_contiguous()


def filled(model, seed=0):
    """Give every trainable value, the zero B included, a random value."""
    model.load(np.random.default_rng(seed).normal(0, 0.2, model.layout.size).astype(np.float32))
    return model


def step(model, images, optimizer):
    model.module.train()
    labels = torch.arange(len(images)) % NUM_CLASSES
    model.flat.grad.zero_()
    cross_entropy(model(images), labels).backward()
    optimizer.step()


OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW([model.flat], lr=0.01, fused=True),
    "sgd": lambda model: torch.optim.SGD([model.flat], lr=0.01, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_and_gradients_are_views_of_the_flat_arrays_throughout(tiny_model, images, name):
    assert_aliases(tiny_model)
    optimizer = OPTIMIZERS[name](tiny_model)
    for _ in range(2):
        before = tiny_model.read()
        step(tiny_model, images, optimizer)
        assert_aliases(tiny_model)
        assert (tiny_model.read() != before).any()
    gradient = torch.cat([trainable(tiny_model)[spec.name].grad.flatten() for spec in tiny_model.layout.tensors])
    assert torch.equal(gradient, tiny_model.flat.grad)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_on_the_flat_array_is_a_step_on_each_tensor(tiny_model, images, name):
    filled(tiny_model)
    twin = copy.deepcopy(tiny_model.module)
    separate = [p for p in twin.parameters() if p.requires_grad]
    kinds = {"adamw": torch.optim.AdamW(separate, lr=0.01), "sgd": torch.optim.SGD(separate, lr=0.01, momentum=0.9)}
    twin.train()
    cross_entropy(twin(images), torch.arange(len(images)) % NUM_CLASSES).backward()
    kinds[name].step()
    step(tiny_model, images, OPTIMIZERS[name](tiny_model))
    for key, parameter in twin.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(trainable(tiny_model)[canonical_name(key)], parameter, rtol=1e-5, atol=1e-6)


def test_moving_keeps_the_values_and_the_views(tiny_model):
    values = filled(tiny_model).read()
    tiny_model.to(torch.device("cpu"))
    assert_aliases(tiny_model)
    np.testing.assert_array_equal(tiny_model.read(), values)
    assert not tiny_model.flat.grad.any()


def test_what_was_loaded_is_read_bit_for_bit(tiny_model):
    values = np.random.default_rng(1).normal(size=tiny_model.layout.size).astype(np.float32)
    values[:4] = [-0.0, np.finfo(np.float32).tiny / 4, np.finfo(np.float32).max, np.nan]
    tiny_model.load(values)
    read = tiny_model.read()
    assert read.tobytes() == values.tobytes()
    read[:] = 7  # a copy: the model does not change
    assert tiny_model.read().tobytes() == values.tobytes()


def test_loading_puts_each_tensor_where_the_layout_says(tiny_model):
    tiny_model.load(np.arange(tiny_model.layout.size, dtype=np.float32))
    for spec in tiny_model.layout.tensors:
        first = trainable(tiny_model)[spec.name].flatten()
        assert first[0] == spec.offset
        assert first[-1] == spec.offset + spec.size - 1


def test_loading_another_size_is_refused(tiny_model):
    with pytest.raises(ValueError, match="shape"):
        tiny_model.load(np.zeros(tiny_model.layout.size + 1, dtype=np.float32))


def test_the_initial_adapter_is_the_same_in_a_fresh_process(tiny_task, built_model, run_python):
    done = run_python(
        "import hashlib, torch\n"
        "from task.config import task_from_json\n"
        "from task.model import build_model\n"
        "from dataclasses import replace\n"
        "torch.manual_seed(99); torch.rand(5)\n"
        f"task = task_from_json({task_to_json(tiny_task)!r})\n"
        "for seed in (task.seed, task.seed + 1):\n"
        f"    model = build_model(replace(task, seed=seed), {NUM_CLASSES})\n"
        "    print(hashlib.sha256(model.read()).hexdigest(), model.base, model.layout.digest)\n"
    )
    assert done.returncode == 0, done.stderr
    same, other = (line.split() for line in done.stdout.splitlines()[-2:])
    model, initial = built_model
    assert same == [hashlib.sha256(initial).hexdigest(), model.base, model.layout.digest]
    assert other[0] != same[0]
    assert other[2] == same[2]


def test_the_initial_adapter_and_head_do_not_depend_on_what_the_backbone_drew(tiny_task, tiny_model):
    larger = build_model(replace(tiny_task, backbone=replace(tiny_task.backbone, image_size=32)), NUM_CLASSES)
    assert larger.base != tiny_model.base
    np.testing.assert_array_equal(larger.read(), tiny_model.read())


def test_building_leaves_the_global_generator_alone(tiny_task):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    build_model(tiny_task, NUM_CLASSES)
    assert torch.equal(torch.rand(4), expected)


def test_the_initial_model_is_the_plain_backbone(tiny_task, tiny_model, images):
    plain = build_backbone(tiny_task.backbone, NUM_CLASSES, seed=tiny_task.seed)
    initial = tiny_model.layout.views(tiny_model.flat.detach())
    with torch.no_grad():
        plain.head.weight.copy_(initial["head.weight"])
        plain.head.bias.copy_(initial["head.bias"])
        torch.testing.assert_close(tiny_model(images), plain(images), rtol=1e-5, atol=1e-6)
    for name, tensor in initial.items():
        assert tensor.any() == ("lora_B" not in name and name != "head.bias"), name


def test_merging_the_adapter_by_its_names_gives_the_same_logits(tiny_task, tiny_model, images):
    """The names of the layout are timm's module paths, and each weight becomes W + alpha/r B A."""
    filled(tiny_model)
    plain = build_backbone(tiny_task.backbone, NUM_CLASSES, seed=tiny_task.seed)
    views = tiny_model.layout.views(tiny_model.flat.detach())
    scale = tiny_task.lora.alpha / tiny_task.lora.rank
    with torch.no_grad():
        for name in views:
            if name.endswith(".lora_A.weight"):
                module = name.removesuffix(".lora_A.weight")
                plain.get_submodule(module).weight += scale * views[f"{module}.lora_B.weight"] @ views[name]
        plain.head.weight.copy_(views["head.weight"])
        plain.head.bias.copy_(views["head.bias"])
        merged = copy.deepcopy(tiny_model.module).merge_and_unload()
        torch.testing.assert_close(tiny_model(images), plain(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merged(images), plain(images), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(
            plain(images), build_backbone(tiny_task.backbone, NUM_CLASSES)(images), rtol=0.1, atol=0.1
        )


def test_training_changes_adapter_and_head_but_no_frozen_weight(tiny_model, images):
    frozen = {name: p for name, p in tiny_model.module.named_parameters() if not p.requires_grad}
    before, start = {name: p.clone() for name, p in frozen.items()}, tiny_model.read()
    assert all(p.grad is None for p in frozen.values())
    optimizer = OPTIMIZERS["adamw"](tiny_model)
    for _ in range(3):
        step(tiny_model, images, optimizer)
    assert all(torch.equal(p, before[name]) for name, p in frozen.items())
    assert all(p.grad is None for p in frozen.values())
    changed = tiny_model.read() != start
    for spec in tiny_model.layout.tensors:
        assert changed[spec.offset : spec.offset + spec.size].any(), spec.name


def test_the_frozen_original_of_the_head_is_not_what_trains(tiny_model):
    names = [name for name, p in tiny_model.module.named_parameters() if p.requires_grad and "head" in name]
    assert len(names) == 2
    assert all("modules_to_save" in name for name in names)


def test_dropout_acts_in_training_mode_only(tiny_task, images):
    model = filled(build_model(replace(tiny_task, lora=replace(tiny_task.lora, dropout=0.5)), NUM_CLASSES))
    with torch.no_grad():
        assert torch.equal(model(images), model(images))
        model.module.train()
        assert not torch.allclose(model(images), model(images))


def test_modes_are_those_of_all_modules(tiny_model):
    for training in (True, True, False, False, True):
        tiny_model.set_training(training)
        assert {module.training for module in tiny_model.module.modules()} == {training}


def test_without_dropout_training_mode_computes_the_same(tiny_model, images):
    filled(tiny_model)
    with torch.no_grad():
        expected = tiny_model(images)
        tiny_model.module.train()
        assert torch.equal(tiny_model(images), expected)


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (["attn.qkw"], "'attn.qkw' matches no linear layer. The model has: attn.proj, attn.qkv, mlp.fc1, mlp.fc2."),
        (["attn.qkv", "fc3"], "'fc3' matches no linear layer."),
        (["kv"], "'kv' matches no linear layer."),
        (["head"], "'head' matches no linear layer."),
        ([], "name at least one linear layer, such as attn.qkv."),
        (["proj"], "'proj' matches patch_embed.proj, which is no linear layer. The model has: attn.proj"),
        (["norm1"], "'norm1' matches blocks.0.norm1, which is no linear layer."),
    ],
)
def test_targets_that_the_model_does_not_have_are_refused(tiny_task, targets, sentence):
    with pytest.raises(ModelError) as caught:
        build_model(replace(tiny_task, lora=replace(tiny_task.lora, targets=targets)), NUM_CLASSES)
    assert f"lora.targets: {sentence}" in str(caught.value)


def test_targets_choose_the_layers_and_rank_their_shapes(tiny_task):
    model = build_model(replace(tiny_task, lora=replace(tiny_task.lora, targets=["fc1"], rank=3)), NUM_CLASSES)
    assert {spec.name: spec.shape for spec in model.layout.tensors} == {
        "blocks.0.mlp.fc1.lora_A.weight": (3, 32),
        "blocks.0.mlp.fc1.lora_B.weight": (128, 3),
        "blocks.1.mlp.fc1.lora_A.weight": (3, 32),
        "blocks.1.mlp.fc1.lora_B.weight": (128, 3),
        "head.weight": (NUM_CLASSES, 32),
        "head.bias": (NUM_CLASSES,),
    }


def test_units_are_blocks_or_modules(tiny_task, tiny_model):
    assert tiny_model.layout.units == ("blocks.0", "blocks.1", HEAD)
    model = build_model(replace(tiny_task, lora=replace(tiny_task.lora, units="module")), NUM_CLASSES)
    modules = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert model.layout.units == (*(f"blocks.{block}.{module}" for block in (0, 1) for module in modules), HEAD)
    np.testing.assert_array_equal(model.read(), tiny_model.read())


def test_a_swin_model_has_its_blocks_as_units(tiny_task, images):
    swin = BackboneConfig(
        name="swin_tiny_patch4_window7_224",
        source="random",
        image_size=32,
        arguments={"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4},
    )
    model = build_model(replace(tiny_task, backbone=swin), NUM_CLASSES)
    assert model.layout.units == ("layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", HEAD)
    assert [spec.name for spec in model.layout.tensors if spec.unit == HEAD] == ["head.fc.weight", "head.fc.bias"]
    assert model(interpolate(images, 32)).shape == (len(images), NUM_CLASSES)
    assert model.head(torch.zeros(2, 16)).shape == (2, NUM_CLASSES)
    assert_aliases(model)


@pytest.fixture(scope="module")
def frozen_task(tiny_task):
    return replace(tiny_task, lora=replace(tiny_task.lora, freeze_a=True))


@pytest.fixture(scope="module")
def frozen_model(frozen_task):
    return build_model(frozen_task, NUM_CLASSES)


def matrices_a(model):
    return {canonical_name(name): p for name, p in model.module.named_parameters() if ".lora_A." in name}


def test_a_frozen_a_is_no_trainable_value_and_does_not_travel(frozen_model, tiny_model):
    assert len(matrices_a(frozen_model)) == 8
    assert not any(p.requires_grad for p in matrices_a(frozen_model).values())
    everything = [spec.name for spec in tiny_model.layout.tensors]
    assert [spec.name for spec in frozen_model.layout.tensors] == [name for name in everything if "lora_A" not in name]
    assert_aliases(frozen_model)


def test_a_frozen_a_is_the_one_that_would_be_trained_from_that_seed(frozen_task, frozen_model, tiny_model):
    initial = tiny_model.layout.views(tiny_model.flat.detach())
    other = build_model(replace(frozen_task, seed=frozen_task.seed + 1), NUM_CLASSES)
    for name, a in matrices_a(frozen_model).items():
        assert torch.equal(a, initial[name])
        assert not torch.equal(a, matrices_a(other)[name])
    assert len({frozen_model.base, other.base, tiny_model.base}) == 3, (
        "the hash covers what is neither trained nor sent"
    )
    for name, values in frozen_model.layout.views(torch.from_numpy(frozen_model.read())).items():
        assert torch.equal(values, initial[name])


def test_a_frozen_a_stays_while_b_and_head_train(frozen_task, images):
    model = build_model(frozen_task, NUM_CLASSES)
    before, start = {name: a.clone() for name, a in matrices_a(model).items()}, model.read()
    optimizer = OPTIMIZERS["adamw"](model)
    for _ in range(2):
        step(model, images, optimizer)
    assert all(torch.equal(a, before[name]) and a.grad is None for name, a in matrices_a(model).items())
    changed = model.read() != start
    assert all(changed[spec.offset : spec.offset + spec.size].any() for spec in model.layout.tensors)


def test_modules_are_found_by_timms_paths(tiny_model):
    assert tiny_model.submodule("blocks.0.attn.qkv").in_features == 32
    assert tiny_model.submodule("blocks.1.mlp.fc1").out_features == 128
    with pytest.raises(AttributeError):
        tiny_model.submodule("blocks.2")


def test_the_head_maps_features_to_logits_by_the_values_that_travel(tiny_model):
    filled(tiny_model)
    views = tiny_model.layout.views(tiny_model.flat.detach())
    with torch.no_grad():
        features = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
        expected = features @ views["head.weight"].T + views["head.bias"]
        torch.testing.assert_close(tiny_model.head(features), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_a_model_on_the_gpu_computes_what_it_does_on_the_cpu(tiny_task, images):
    model = filled(build_model(tiny_task, NUM_CLASSES))
    with torch.no_grad():
        expected = model(images)
    values = model.read()
    model.to(torch.device("cuda"))
    assert_aliases(model)
    assert model.flat.is_cuda
    np.testing.assert_array_equal(model.read(), values)
    with torch.no_grad():
        torch.testing.assert_close(model(images.cuda()).cpu(), expected, rtol=1e-2, atol=1e-2)
    step(model, images.cuda(), OPTIMIZERS["adamw"](model))
    assert_aliases(model)
    model.load(values)
    np.testing.assert_array_equal(model.read(), values)
