"""The saved adapter, opened by peft on a freshly built timm model."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from server_app.compose import compose_run
from server_app.saving import open_adapter, save_adapter, save_personal
from strategies.report import RoundReport
from task.errors import ConfigError, ModelError
from task.libraries import peft, timm
from task.model import build_model

CLASSES = ["apple", "pear", "plum"]
TINY = "backbone.image_size=16 backbone.arguments={patch_size:4,embed_dim:32,depth:2,num_heads:2} lora.rank=4"


@pytest.fixture(scope="module")
def run():
    return compose_run({"strategy": "fedprox", "backbone": "vit_pico_random", "seed": 3, "overrides": TINY})


@pytest.fixture(scope="module")
def model(run):
    model = build_model(run.settings, len(CLASSES))
    values = np.random.default_rng(0).normal(0, 0.2, model.layout.size)
    model.load(values.astype(np.float32))
    return model


@pytest.fixture
def saved(run, model, tmp_path):
    last = RoundReport(5, central={"accuracy": 0.98765}, clients_accuracy_mean=0.5, clients_used=["a", "b"])
    save_adapter(tmp_path / "adapter", model, run, CLASSES, [last])
    return tmp_path / "adapter"


def test_peft_opens_it_on_a_fresh_backbone_with_the_same_logits(saved, run, model, images):
    plain = timm.create_model(
        run.settings.backbone.name, img_size=16, num_classes=len(CLASSES), **run.settings.backbone.arguments
    )
    frozen = {name: p for name, p in model.module.get_base_model().named_parameters() if not p.requires_grad}
    names = {name.replace(".base_layer", "").replace(".original_module", ""): p for name, p in frozen.items()}
    plain.load_state_dict(names)
    opened = peft.PeftModel.from_pretrained(plain, str(saved)).eval()
    with torch.no_grad():
        torch.testing.assert_close(opened(images), model(images), rtol=1e-5, atol=1e-6)


def test_the_head_stands_by_itself(saved, model):
    head, views = load_file(saved / "head.safetensors"), model.layout.views(model.flat.detach())
    assert head.keys() == {"head.weight", "head.bias"}
    assert all(torch.equal(head[name], views[name]) for name in head)


def test_no_frozen_weight_is_saved(saved, model):
    tensors = load_file(saved / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == model.layout.size


def test_the_card_says_what_it_is_and_how_good(saved, run, model):
    card = (saved / "README.md").read_text()
    for part in (
        "# digits with vit_tiny_patch16_224, merged by fedprox",
        "| accuracy on the server's test images | 98.77 % |",
        "| mean accuracy on the clients' own test images | 50.00 % |",
        "| classes | apple, pear, plum |",
        f"SHA-256 `{model.base}`",
        f"{model.layout.size:,} parameters",
        "rank 4",
        "5 rounds",
        "| seed | 3 |",
    ):
        assert part in card, part
    assert not re.search(r"{[a-z]", card), "a field of the card was not filled in"
    assert "'embed_dim': 32" in card


def test_the_card_says_where_nothing_was_evaluated(run, model, tmp_path):
    save_adapter(tmp_path, model, run, CLASSES, [RoundReport(1)])
    assert (tmp_path / "README.md").read_text().count("not evaluated") == 2


def test_no_path_of_this_machine_is_saved(saved, tmp_path):
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    assert sorted(config["target_modules"]) == ["attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2"]
    for name in ("adapter_config.json", "README.md"):
        assert str(tmp_path) not in (saved / name).read_text()


def test_open_adapter_gives_the_logits_of_the_run(saved, run, model):
    (saved.parent / "config.yaml").write_text(run.yaml)
    opened = open_adapter(saved.parent)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(opened(images), model(images))


def test_open_adapter_refuses_another_backbone(saved, run):
    (saved.parent / "config.yaml").write_text(run.yaml)
    open_adapter(saved.parent)
    facts = json.loads((saved / "petalwise.json").read_text())
    assert facts["classes"] == CLASSES
    (saved / "petalwise.json").write_text(json.dumps({**facts, "base": "ab" * 32}))
    with pytest.raises(ModelError, match="the run's had abababababab"):
        open_adapter(saved.parent)


def test_a_clients_own_model_opens_by_its_name(saved, run, model, images):
    (saved.parent / "config.yaml").write_text(run.yaml)
    with pytest.raises(ConfigError, match="no personal model of client '7'; there are: none; pfedla and heur_pfedla"):
        open_adapter(saved.parent, client="7")
    shared = torch.from_numpy(model.read())
    save_personal(saved, {"7": shared + 0.1, "10": shared, "__metadata__": shared.clone()})
    with pytest.raises(ConfigError, match="client '8'; there are: 7, 10, __metadata__"):
        open_adapter(saved.parent, client="8")
    try:
        model.load((shared + 0.1).numpy())
        with torch.no_grad():
            torch.testing.assert_close(open_adapter(saved.parent, client="7")(images), model(images))
    finally:
        model.load(shared.numpy())
    with torch.no_grad():
        torch.testing.assert_close(open_adapter(saved.parent, client="10")(images), model(images))
