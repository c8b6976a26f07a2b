"""How trainable tensors lie in the flat array, for any names and shapes."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from task.errors import ModelError
from task.units import HEAD, Layout, TensorSpec, head_shape, head_specs, lora_layers, make_layout, unit_of

VIT = [
    f"blocks.{block}.{module}.lora_{factor}.weight"
    for block in (0, 1, 10)
    for module in ("attn.qkv", "attn.proj", "mlp.fc1")
    for factor in "AB"
]
SWIN = [name.replace("blocks", f"layers.{layer}.blocks") for layer in (0, 1) for name in VIT]
OUTSIDE = ["attn_pool.mlp.fc1.lora_A.weight", "attn_pool.mlp.fc1.lora_B.weight", "head.weight", "head.bias"]

granularities = st.sampled_from(["block", "module"])
shapes = st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple)
models = st.dictionaries(st.sampled_from(VIT + SWIN + OUTSIDE), shapes, min_size=1)


@given(models, granularities)
def test_tensors_follow_one_another_without_gaps(model, granularity):
    layout = make_layout(model, granularity)
    ends = [spec.offset + spec.size for spec in layout.tensors]
    assert [spec.offset for spec in layout.tensors] == [0, *ends[:-1]]
    assert layout.size == ends[-1] == sum(math.prod(shape) for shape in model.values())
    assert {spec.name: spec.shape for spec in layout.tensors} == model


@given(models, granularities)
def test_units_are_contiguous_and_the_head_is_last(model, granularity):
    layout = make_layout(model, granularity)
    changes = sum(one.unit != next_one.unit for one, next_one in pairwise(layout.tensors))
    assert changes == len(layout.units) - 1
    parts = list(layout.slices.values())
    assert (parts[0].start, parts[-1].stop) == (0, layout.size)
    assert all(one.stop == next_one.start for one, next_one in pairwise(parts))
    for spec in layout.tensors:
        part = layout.slices[spec.unit]
        assert part.start <= spec.offset
        assert spec.offset + spec.size <= part.stop
    assert HEAD not in layout.units[:-1]
    assert (HEAD in layout.units) == any(name.startswith("head.") for name in model)


@given(models, granularities)
def test_model_order_is_kept_within_a_unit_and_between_first_appearances(model, granularity):
    layout, names = make_layout(model, granularity), list(model)
    for unit in layout.units:
        members = [spec.name for spec in layout.tensors if spec.unit == unit]
        assert members == sorted(members, key=names.index)
    firsts = [next(names.index(s.name) for s in layout.tensors if s.unit == u) for u in layout.units if u != HEAD]
    assert firsts == sorted(firsts)


@given(models, granularities)
def test_views_share_the_memory_of_the_flat_array(model, granularity):
    layout = make_layout(model, granularity)
    flat = torch.arange(layout.size, dtype=torch.float32)
    views, unit_views = layout.views(flat), layout.unit_views(flat)
    assert torch.equal(torch.cat([view.flatten() for view in views.values()]), flat)
    assert torch.equal(torch.cat(list(unit_views.values())), flat)
    for spec in layout.tensors:
        assert views[spec.name].shape == spec.shape
        views[spec.name].fill_(-1)
        assert (flat[spec.offset : spec.offset + spec.size] == -1).all()
    for unit in unit_views.values():
        unit.fill_(-2)
    assert (flat == -2).all()


@given(models, granularities)
def test_digest_depends_on_content_alone(model, granularity):
    layout = make_layout(model, granularity)
    assert layout.digest == make_layout(dict(model), granularity).digest
    assert layout.digest == Layout(tuple(TensorSpec(s.unit, s.name, s.shape, s.offset) for s in layout.tensors)).digest


@pytest.mark.parametrize(
    "other",
    [
        {"blocks.0.attn.qkv.lora_A.weight": (2, 4), "blocks.0.attn.qkv.lora_B.weight": (3, 2)},
        {"blocks.0.attn.qkv.lora_A.weight": (8,), "blocks.0.attn.proj.lora_A.weight": (3, 2)},
        {"blocks.0.attn.qkv.lora_A.weight": (4, 2), "blocks.0.attn.proj.lora_A.weight": (2, 3)},
        {"blocks.0.attn.proj.lora_A.weight": (3, 2), "blocks.0.attn.qkv.lora_A.weight": (2, 4)},
        {"blocks.0.attn.qkv.lora_A.weight": (2, 4), "blocks.1.attn.proj.lora_A.weight": (3, 2)},
        {"blocks.0.attn.qkv.lora_A.weight": (2, 4)},
    ],
    ids=["name", "rank", "shape", "order", "block", "fewer"],
)
def test_digest_changes_with_the_model(other):
    model = {"blocks.0.attn.qkv.lora_A.weight": (2, 4), "blocks.0.attn.proj.lora_A.weight": (3, 2)}
    assert make_layout(model).digest != make_layout(other).digest


def test_digest_changes_with_an_offset():
    assert Layout((TensorSpec("u", "n", (2,), 0),)).digest != Layout((TensorSpec("u", "n", (2,), 4),)).digest


def test_digest_changes_with_the_granularity():
    model = dict.fromkeys(VIT, (2, 2))
    assert make_layout(model, "block").digest != make_layout(model, "module").digest


@pytest.mark.parametrize(
    ("name", "block", "module"),
    [
        ("blocks.0.attn.qkv.lora_A.weight", "blocks.0", "blocks.0.attn.qkv"),
        ("blocks.10.mlp.fc2.lora_B.weight", "blocks.10", "blocks.10.mlp.fc2"),
        ("layers.0.blocks.1.attn.proj.lora_A.weight", "layers.0.blocks.1", "layers.0.blocks.1.attn.proj"),
        ("stages.2.blocks.0.mlp.fc1.lora_B.weight", "stages.2.blocks.0", "stages.2.blocks.0.mlp.fc1"),
        (
            "layers.1.downsample.reduction.lora_A.weight",
            "layers.1.downsample.reduction",
            "layers.1.downsample.reduction",
        ),
        ("attn_pool.mlp.fc1.lora_B.weight", "attn_pool.mlp.fc1", "attn_pool.mlp.fc1"),
        ("superblocks.0.fc.lora_A.weight", "superblocks.0.fc", "superblocks.0.fc"),
        ("head.weight", HEAD, HEAD),
        ("head.bias", HEAD, HEAD),
        ("header.fc.lora_A.weight", "header.fc", "header.fc"),
    ],
)
def test_units_of_vision_transformers(name, block, module):
    assert unit_of(name, "block") == block
    assert unit_of(name, "module") == module


def test_a_head_by_another_path_is_the_head():
    assert unit_of("head.fc.weight", "block", "head.fc") == HEAD
    assert unit_of("fc.bias", "module", "fc") == HEAD
    assert unit_of("head.weight", "block", "fc") == "head"


def test_both_factors_of_a_module_are_in_one_unit():
    layout = make_layout(dict.fromkeys(VIT, (1,)), "module")
    assert layout.units == tuple(name.removesuffix(".lora_A.weight") for name in VIT if "lora_A" in name)
    assert make_layout(dict.fromkeys(VIT, (1,)), "block").units == ("blocks.0", "blocks.1", "blocks.10")


PAIRS = [name.removesuffix(".lora_A.weight") for name in VIT + SWIN + OUTSIDE if "lora_A" in name]


@given(models, granularities)
def test_adapted_layers_are_found_by_their_factors(model, granularity):
    layout = make_layout(model, granularity)
    specs = {spec.name: spec for spec in layout.tensors}
    layers = lora_layers(layout)
    expected = {name for name in PAIRS if f"{name}.lora_B.weight" in model}  # no layer by its A alone
    assert {layer.name for layer in layers} == expected
    assert len(layers) == len(expected)
    for layer in layers:
        assert layer.b is specs[f"{layer.name}.lora_B.weight"]
        assert layer.a is specs.get(f"{layer.name}.lora_A.weight")
        assert layer.specs == tuple(spec for spec in (layer.a, layer.b) if spec is not None)


@given(st.permutations(PAIRS), granularities)
def test_adapted_layers_are_in_order_of_the_layout(names, granularity):
    layout = make_layout({f"{name}.lora_{factor}.weight": (1, 1) for name in names for factor in "AB"}, granularity)
    offsets = [layer.a.offset for layer in lora_layers(layout)]
    assert offsets == sorted(offsets)
    assert len(offsets) == len(PAIRS)


def test_a_layers_inputs_are_those_of_its_first_exchanged_factor():
    whole = {"blocks.0.mlp.fc1.lora_A.weight": (2, 7), "blocks.0.mlp.fc1.lora_B.weight": (9, 2)}
    (layer,) = lora_layers(make_layout(whole))
    assert layer.inputs == 7
    (layer,) = lora_layers(make_layout({"blocks.0.mlp.fc1.lora_B.weight": (9, 2)}))
    assert (layer.a, layer.inputs) == (None, 2)


@pytest.mark.parametrize("head", ["head", "head.fc", "classifier"])
@pytest.mark.parametrize("bias_first", [False, True])
def test_the_head_is_a_matrix_and_a_vector(head, bias_first):
    shapes = {f"{head}.weight": (5, 8), f"{head}.bias": (5,)}
    shapes = dict(reversed(shapes.items())) if bias_first else shapes
    layout = make_layout({**dict.fromkeys(VIT[:2], (5, 8)), **shapes}, head=head)
    weight, bias = head_specs(layout)
    assert (weight.name, bias.name) == (f"{head}.weight", f"{head}.bias")
    assert head_shape(layout) == (5, 8)


def test_a_head_may_have_no_bias():
    layout = make_layout({"head.weight": (5, 8)})
    assert head_specs(layout) == (layout.tensors[0], None)


@pytest.mark.parametrize(
    "shapes", [{}, {"head.bias": (5,)}, {"head.0.weight": (5, 8), "head.1.weight": (5, 5)}], ids=["no", "bias", "two"]
)
def test_another_head_cannot_be_merged_by_class(shapes):
    layout = make_layout({**dict.fromkeys(VIT[:2], (5, 8)), **shapes})
    with pytest.raises(ModelError, match="no linear head to merge by class; its units are: blocks.0"):
        head_specs(layout)
