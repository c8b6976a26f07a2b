"""Where backbone weights come from, what is refused, and the hash that names them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from task.backbone import PACKAGED_FOLDER, backbone_folder, base_hash, build_backbone, head_name, resolved
from task.config import BackboneConfig, TaskConfig, typed
from task.errors import DataError, ModelError
from task.libraries import timm
from task.model import build_model
from task.packaged_weights import read_packaged_weights
from tests.conftest import NUM_CLASSES, REPOSITORY


def from_conf(name: str) -> BackboneConfig:
    return typed(BackboneConfig, OmegaConf.load(REPOSITORY / "conf" / "backbone" / f"{name}.yaml"))


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_equal_but(first, second, *left_out):
    assert first.keys() == second.keys()
    for name in first:
        if not name.startswith(left_out):
            assert torch.equal(first[name], second[name]), name


@pytest.fixture
def checkpoint(tiny_task, tmp_path):
    """A safetensors file of the tiny ViT at 32 px with 11 classes, the config that reads it, and its tensors."""
    larger = replace(tiny_task.backbone, image_size=32)
    state = build_backbone(larger, 11, seed=5).state_dict()
    state["head.weight"] = torch.full_like(state["head.weight"], 9.0)
    save_file(state, tmp_path / "tiny.safetensors")
    return replace(tiny_task.backbone, source="checkpoint", checkpoint="tiny.safetensors"), state


def test_random_weights_depend_on_the_seed_alone(tiny_task):
    config = tiny_task.backbone
    torch.manual_seed(1)
    first = weights(build_backbone(config, NUM_CLASSES, seed=3))
    torch.manual_seed(2)
    assert_equal_but(first, weights(build_backbone(config, NUM_CLASSES, seed=3)))
    other = weights(build_backbone(config, NUM_CLASSES, seed=4))
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


def test_a_backbone_is_in_evaluation_mode_and_float32(checkpoint, tmp_path):
    config, state = checkpoint
    save_file({name: tensor.half() for name, tensor in state.items()}, tmp_path / "tiny.safetensors")
    model = build_backbone(config, NUM_CLASSES, tmp_path)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"].half().float())


def test_a_checkpoint_gives_all_weights_but_the_head(checkpoint, tmp_path):
    config, state = checkpoint
    same_size = weights(build_backbone(replace(config, image_size=32), NUM_CLASSES, tmp_path))
    assert_equal_but(same_size, state, "head.")
    assert same_size["head.weight"].shape == (NUM_CLASSES, 32)
    as_many_classes = weights(build_backbone(replace(config, image_size=32), 11, tmp_path))
    assert not (as_many_classes["head.weight"] == 9.0).any(), "the head must be a new one"


def test_position_embeddings_are_resampled_to_the_image_size(checkpoint, tmp_path):
    config, state = checkpoint
    small = weights(build_backbone(config, NUM_CLASSES, tmp_path))
    assert_equal_but(small, state, "head.", "pos_embed")
    assert state["pos_embed"].shape == (1, 1 + 8 * 8, 32)
    expected = timm.layers.resample_abs_pos_embed(state["pos_embed"], [4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(small["pos_embed"], expected)
    assert torch.equal(small["pos_embed"][:, 0], state["pos_embed"][:, 0])


def test_a_checkpoint_that_lacks_tensors_is_refused(checkpoint, tmp_path):
    config, state = checkpoint
    for missing in ("blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc1.bias"):
        del state[missing]
    save_file(state, tmp_path / "tiny.safetensors")
    with pytest.raises(ModelError, match=r"'tiny.safetensors' lacks 2 tensors of 'vit_tiny_.*blocks\.1\.mlp"):
        build_backbone(config, NUM_CLASSES, tmp_path)


def test_a_checkpoint_of_another_shape_is_refused(checkpoint, tmp_path):
    config, state = checkpoint
    state["blocks.1.mlp.fc1.weight"] = torch.zeros(3, 3)
    save_file(state, tmp_path / "tiny.safetensors")
    with pytest.raises(ModelError, match=r"blocks\.1\.mlp\.fc1\.weight"):
        build_backbone(config, NUM_CLASSES, tmp_path)


def test_a_damaged_checkpoint_is_refused(checkpoint, tmp_path):
    config, _ = checkpoint
    content = (tmp_path / "tiny.safetensors").read_bytes()
    for damaged in (content[:-1], b"", b"\xff" * 100):
        (tmp_path / "tiny.safetensors").write_bytes(damaged)
        with pytest.raises(ModelError, match=r"'tiny.safetensors' is no intact safetensors file"):
            build_backbone(config, NUM_CLASSES, tmp_path)


@pytest.mark.parametrize("name", ["sub/tiny.safetensors", "../tiny.safetensors", "/etc/passwd", "", ".", "a/"])
def test_only_bare_file_names_are_read(checkpoint, tmp_path, name):
    with pytest.raises(ModelError, match="must be a bare file name, without a folder"):
        build_backbone(replace(checkpoint[0], checkpoint=name), NUM_CLASSES, tmp_path)


@pytest.mark.parametrize("folder", [None, Path("/nowhere"), Path("..")])
def test_a_missing_file_is_told_with_where_to_put_it(checkpoint, folder):
    with pytest.raises(ModelError, match=r"'tiny.safetensors' is not in.*backbones=.*PETALWISE_BACKBONES") as caught:
        build_backbone(checkpoint[0], NUM_CLASSES, folder)
    assert "/nowhere" not in str(caught.value)


def test_a_checkpoint_that_cannot_be_opened_is_told_without_its_folder(checkpoint, tmp_path, monkeypatch):
    def deny(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("task.backbone.load_file", deny)
    with pytest.raises(ModelError, match="Permission denied: 'tiny.safetensors'") as caught:
        build_backbone(checkpoint[0], NUM_CLASSES, tmp_path)
    assert str(tmp_path) not in str(caught.value)


def test_reasons_of_timm_are_told_without_folders(tiny_task, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no cache in /home/someone/.cache/huggingface")

    monkeypatch.setattr("task.backbone.timm.create_model", fail)
    with pytest.raises(ModelError, match="no cache in huggingface"):
        build_backbone(tiny_task.backbone, NUM_CLASSES)


@pytest.mark.parametrize(("size", "nearest"), [(18, "16 or 20"), (30, "28 or 32")])
def test_an_image_size_that_cuts_patches_is_refused_with_the_nearest(tiny_task, size, nearest):
    with pytest.raises(ModelError, match=rf"image_size={size} is no multiple of the patch size 4 .*; take {nearest}\."):
        build_backbone(replace(tiny_task.backbone, image_size=size), NUM_CLASSES)


def test_a_model_with_batch_normalisation_is_refused_by_name():
    with pytest.raises(ModelError, match="'xcit_nano_12_p16_224' has batch normalisation"):
        build_backbone(BackboneConfig(name="xcit_nano_12_p16_224", source="random", image_size=224), NUM_CLASSES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 16_384, "num_heads": 2}, "parameters, more than 2000000000"),
        ({"depth": 1_000_000_000}, "backbone.arguments: depth=1000000000 is more than 16384"),
        ({"depths": [2, 20_000]}, r"depths=\[2, 20000\] is more than"),
    ],
)
def test_a_server_cannot_make_a_client_build_a_model_beyond_all_memory(arguments, message):
    with pytest.raises(ModelError, match=message):
        build_backbone(BackboneConfig(source="random", image_size=32, arguments=arguments), NUM_CLASSES)


def test_any_timm_model_is_used_as_it_was_pretrained():
    config = replace(from_conf("timm"), name="vit_small_patch14_dinov2.lvd142m")
    assert replace(config, image_size=518, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]) == resolved(config)
    assert resolved(replace(config, image_size=56, std=[1.0, 1.0, 1.0])).image_size == 56
    assert resolved(replace(config, std=[1.0, 1.0, 1.0])).std == [1.0, 1.0, 1.0]
    with pytest.raises(ModelError, match="backbone.name is empty; give"):
        resolved(from_conf("timm"))


def test_a_backbone_is_built_at_its_pretrained_size_where_none_is_given(tiny_task):
    model = build_backbone(replace(tiny_task.backbone, image_size=0), NUM_CLASSES)
    assert model.patch_embed.img_size == (224, 224)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "conf" / "backbone").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_file_gives_what_its_model_was_pretrained_with(path):
    config = from_conf(path.stem)
    if config.source == "hub" and config.name:
        pretrained = resolved(replace(config, mean=[], std=[]))
        assert (config.mean, config.std) == (pretrained.mean, pretrained.std)


def test_the_node_config_wins_over_the_environment(tmp_path, monkeypatch):
    of_environment, of_node = (tmp_path / name for name in ("environment", "node"))
    of_environment.mkdir()
    of_node.mkdir()
    assert backbone_folder({}) is None
    monkeypatch.setenv("PETALWISE_BACKBONES", str(of_environment))
    assert backbone_folder({}) == of_environment
    assert backbone_folder({"backbones": str(of_node)}) == of_node
    assert backbone_folder({"backbones": ""}) == of_environment
    with pytest.raises(DataError, match="no folder 'gone' .* key \"backbones\""):
        backbone_folder({"backbones": str(tmp_path / "gone")})


def test_an_unknown_model_is_told_with_similar_ones(tiny_task):
    with pytest.raises(ModelError, match=r"'vit_tinny_patch16_224' is no timm model. Similar: .*vit_tiny_patch16_224"):
        build_backbone(replace(tiny_task.backbone, name="vit_tinny_patch16_224"), NUM_CLASSES)


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "local-dir:/tmp", "/tmp"])
def test_only_models_of_timm_itself_are_built(tiny_task, name):
    with pytest.raises(ModelError, match="is no timm model"):
        build_backbone(replace(tiny_task.backbone, name=name), NUM_CLASSES)


@pytest.mark.parametrize(
    "arguments",
    [{"depth": -1}, {"num_heads": 0}, {"patch_size": 0}, {"num_heads": 3}, {"nonsense": 1}, {"embed_dim": "wide"}],
)
def test_arguments_that_do_not_fit_are_told_with_model_and_source(tiny_task, arguments):
    config = replace(tiny_task.backbone, arguments={**tiny_task.backbone.arguments, **arguments})
    with pytest.raises(ModelError, match=r"timm cannot build 'vit_tiny_patch16_224' at 16 px from source 'random': "):
        build_backbone(config, NUM_CLASSES)


@pytest.mark.parametrize(
    "argument", ["checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "img_size"]
)
def test_arguments_cannot_make_a_client_read_other_files(tiny_task, argument):
    config = replace(tiny_task.backbone, arguments={**tiny_task.backbone.arguments, argument: "/etc/passwd"})
    with pytest.raises(ModelError, match=rf"backbone.arguments: '{argument}' is not allowed; use .*source"):
        build_backbone(config, NUM_CLASSES)


def test_a_model_with_two_heads_is_refused(tiny_task):
    config = replace(tiny_task.backbone, name="deit_tiny_distilled_patch16_224")
    with pytest.raises(ModelError, match="several heads"):
        build_model(replace(tiny_task, backbone=config), NUM_CLASSES)


def test_the_hub_out_of_reach_is_told_with_model_and_source():
    """The tests run with the hub's offline mode on."""
    config = BackboneConfig(name="vit_tiny_patch16_224.augreg_in21k", source="hub", image_size=32)
    with pytest.raises(ModelError, match=r"'vit_tiny_.*_in21k' at 32 px from source 'hub': .*connection"):
        build_backbone(config, NUM_CLASSES)


def test_a_packaged_file_that_is_not_there_is_told_with_those_that_are(tiny_task):
    for name in ("nope.json", ".."):
        config = replace(tiny_task.backbone, source="packaged", checkpoint=name)
        with pytest.raises(ModelError, match=r"does not come with the app, which has: "):
            build_backbone(config, NUM_CLASSES)


@pytest.mark.skipif(not (PACKAGED_FOLDER / "vit_pico.json").is_file(), reason="no packaged weights here")
@pytest.mark.parametrize("image_size", [32, 48])
def test_the_packaged_backbone_has_the_weights_of_its_file(image_size):
    model = build_backbone(replace(from_conf("vit_pico"), image_size=image_size), NUM_CLASSES)
    state = read_packaged_weights(PACKAGED_FOLDER / "vit_pico.json")
    built = {name: p for name, p in weights(model).items() if not name.startswith("head.")}
    left_out = () if image_size == 32 else ("pos_embed",)
    assert_equal_but(built, {name: state[name].float() for name in built}, *left_out)
    assert model(torch.zeros(1, 3, image_size, image_size)).shape == (1, NUM_CLASSES)


def test_equal_weights_have_an_equal_hash_whatever_head_and_image_size(tiny_task, checkpoint, tmp_path):
    config, _ = checkpoint
    expected = base_hash(build_backbone(config, NUM_CLASSES, tmp_path))
    assert len(expected) == 64
    assert base_hash(build_backbone(config, 7, tmp_path, seed=8)) == expected
    assert base_hash(build_backbone(replace(config, image_size=32), 11, tmp_path)) == expected
    assert base_hash(build_backbone(tiny_task.backbone, NUM_CLASSES)) != expected


def test_any_frozen_weight_changes_the_hash(tiny_task):
    model = build_backbone(tiny_task.backbone, NUM_CLASSES)
    before = base_hash(model)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            first = parameter.view(-1)[0]
            kept = first.clone()
            first.add_(0.5)
            assert (base_hash(model) == before) == (name.startswith("head.") or name == "pos_embed"), name
            first.copy_(kept)
    assert base_hash(model) == before


def test_the_hash_is_that_of_the_backbone_without_adapter(tiny_task, tiny_model):
    assert tiny_model.base == base_hash(build_backbone(tiny_task.backbone, NUM_CLASSES, seed=tiny_task.seed))


def test_the_head_is_where_timm_says():
    assert head_name(timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=32, num_heads=2)) == "head"
    assert head_name(timm.create_model("swin_tiny_patch4_window7_224", depths=(1,), embed_dim=8, num_heads=(1,))) == (
        "head.fc"
    )


@pytest.mark.data
def test_dinov2_from_a_local_file_at_56_px(test_data):
    config = from_conf("dinov2_small_file")
    assert config.image_size == 56
    model = build_model(TaskConfig(backbone=config), NUM_CLASSES, test_data / "backbones")
    assert model.layout.units == (*(f"blocks.{block}" for block in range(12)), "head")
    with torch.inference_mode():
        logits = model(torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, NUM_CLASSES)
    assert logits.isfinite().all()
    larger = build_model(TaskConfig(backbone=replace(config, image_size=112)), 3, test_data / "backbones")
    assert larger.base == model.base
