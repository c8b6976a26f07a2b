"""The composed config: every file in conf/, the keys of the run config, and each mistake's sentence."""

import contextlib
import dataclasses
import tomllib

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from server_app.compose import CONF_FOLDER, FIRST_CLASS_KEYS, RunSettings, _quoted, compose_run
from strategies import STRATEGIES
from task.config import LoraConfig, TaskConfig, TrainConfig, task_from_json, task_to_json
from task.errors import ConfigError
from tests.conftest import REPOSITORY

GROUPS = ("strategy", "backbone", "dataset", "partition", "lora", "train", "calibration")
PRESETS = {
    "ccvr": "fedavg",
    "fedlama": "fedavg",
    "fedluar": "fedavg",
    "heur_pfedla": "pfedla",
    "livar_ccvr": "livar",
    "livar_published_code": "livar",
}  # files that choose for a strategy
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONF_FOLDER / group).glob("*.yaml"))]


def refusal(overrides="", **run_config):
    with pytest.raises(ConfigError) as caught:
        compose_run({**run_config, "overrides": overrides})
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_file_composes_into_a_valid_config_that_clients_can_read(group, option):
    run = compose_run({"overrides": f"{group}={option}"})
    chosen = OmegaConf.to_container(OmegaConf.load(CONF_FOLDER / group / f"{option}.yaml")) or {}
    chosen.pop("defaults", None)
    everything = dataclasses.asdict(run.settings)
    assert everything["strategy"] == dataclasses.asdict(run.strategy)
    groups = chosen if "strategy" in chosen else {group: chosen}
    for part, values in groups.items():
        assert {key: everything[part][key] for key in values} == values
    part = {item.name: getattr(run.settings, item.name) for item in dataclasses.fields(TaskConfig)}
    assert task_from_json(task_to_json(run.settings)) == TaskConfig(**part)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_file_lists_exactly_the_options_with_their_defaults(name):
    listed = OmegaConf.to_container(OmegaConf.load(CONF_FOLDER / "strategy" / f"{name}.yaml"))
    listed = listed.get("strategy", listed)
    assert listed == {**dataclasses.asdict(STRATEGIES[name].Config()), "name": name}
    assert next(iter(listed)) == "name"


def test_every_strategy_has_a_file_and_every_file_a_strategy():
    assert {option for group, option in OPTIONS if group == "strategy"} == {*STRATEGIES, *PRESETS}


@pytest.mark.parametrize(("option", "name"), PRESETS.items())
def test_a_preset_chooses_for_a_strategy(option, name):
    assert compose_run({"strategy": option}).strategy.name == name


def test_a_strategy_sets_what_it_needs_and_the_user_has_the_last_word():
    assert compose_run({"strategy": "ffa_lora"}).settings.lora.freeze_a
    assert refusal("lora.freeze_a=false", strategy="ffa_lora").startswith("strategy=ffa_lora needs lora.freeze_a=true")
    run = compose_run({"strategy": "livar_ccvr", "overrides": "strategy.head=samples calibration.epochs=2"})
    calibration = run.settings.calibration
    assert (calibration.name, calibration.mixture, calibration.every_round, calibration.epochs) == (
        "ccvr",
        True,
        True,
        2,
    )
    assert compose_run({"strategy": "livar_ccvr", "overrides": "calibration=none"}).settings.calibration.name == "none"


def test_published_code_differs_from_the_papers_text_in_named_options():
    text, code = (dataclasses.asdict(compose_run({"strategy": s}).strategy) for s in ("livar", "livar_published_code"))
    assert {key for key in text if text[key] != code[key]} == {
        "scores",
        "variance_samples",
        "variance_taken",
        "variance_model",
        "variance_images",
        "evaluated",
    }


@pytest.mark.parametrize(("group", "schema"), [("lora", LoraConfig), ("train", TrainConfig)])
def test_the_default_files_are_the_schemas_defaults(group, schema):
    listed = OmegaConf.to_container(OmegaConf.load(CONF_FOLDER / group / "default.yaml"))
    assert listed == dataclasses.asdict(schema())


def test_the_defaults_of_the_run_config_are_those_of_conf():
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    config = OmegaConf.to_container(OmegaConf.load(CONF_FOLDER / "config.yaml"))
    chosen = [entry for entry in config.pop("defaults") if isinstance(entry, dict)]
    expected = {key: value for entry in [*chosen, config] for key, value in entry.items()}
    assert set(declared) == {*FIRST_CLASS_KEYS, "resume", "overrides"}
    assert declared.pop("overrides") == declared.pop("resume") == ""
    assert {key: expected[key.replace("-", "_")] for key in declared} == declared
    assert compose_run({**declared, "overrides": ""}) == compose_run({})


def test_first_class_keys_choose_files_and_values():
    run = compose_run(
        {
            "strategy": "fedprox",
            "backbone": "vit_pico_random",
            "dataset": "cifar100",
            "partition": "iid",
            "num-server-rounds": 7,
            "seed": 11,
            "runs-dir": "/some where/else",
            "not-ours": "ignored",
        }
    )
    settings = run.settings
    assert run.strategy.name == "fedprox"
    assert (settings.backbone.source, settings.dataset.label_column, settings.partition.kind) == (
        "random",
        "fine_label",
        "iid",
    )
    assert (settings.num_server_rounds, settings.seed, settings.runs_dir) == (7, 11, "/some where/else")


def test_several_overrides_are_separated_by_blanks_and_win_over_first_class_keys():
    overrides = "strategy.proximal_mu=0.5  train.lr=0.25 lora.targets=[qkv,mlp.fc1] dataset.classes=['a b',c] seed=4"
    run = compose_run({"strategy": "fedprox", "seed": 3, "overrides": overrides})
    assert run.strategy.proximal_mu == 0.5
    assert run.settings.train.lr == 0.25
    assert run.settings.lora.targets == ["qkv", "mlp.fc1"]
    assert run.settings.dataset.classes == ["a b", "c"]
    assert run.settings.seed == 4


@pytest.mark.parametrize("text", ['["rose, wild",tulip]', "['rose, wild',tulip]", '["rose, wild", tulip]'])
def test_a_list_of_overrides_is_taken_as_it_is(text):
    run = compose_run({"overrides": "seed=1"}, [f"dataset.classes={text}", "seed=2"])
    assert run.settings.dataset.classes == ["rose, wild", "tulip"]
    assert run.settings.seed == 2


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ('["rose, wild",tulip]', ["rose, wild", "tulip"]),
        ("['rose, wild','tu lip']", ["rose, wild", "tu lip"]),
        (r'["6\" pot, red",tulip]', ['6" pot, red', "tulip"]),
    ],
)
def test_quotes_in_the_overrides_reach_hydra(text, classes):
    run = compose_run({"overrides": f"seed=1 dataset.classes={text}  lora.rank=4"})
    assert run.settings.dataset.classes == classes
    assert (run.settings.seed, run.settings.lora.rank) == (1, 4)


def test_arguments_of_the_backbone_can_be_changed_and_added():
    run = compose_run({"overrides": "backbone.arguments.depth=2 +backbone.arguments.drop_path_rate=0.1"})
    assert run.settings.backbone.arguments["depth"] == 2
    assert run.settings.backbone.arguments["drop_path_rate"] == 0.1


def test_the_yaml_is_the_whole_config():
    run = compose_run({"strategy": "fedprox", "overrides": "train.lr=0.25"})
    saved = OmegaConf.to_container(OmegaConf.create(run.yaml))
    assert saved == dataclasses.asdict(run.settings)
    assert set(saved) == {item.name for item in dataclasses.fields(RunSettings)}


def test_the_yaml_holds_no_interpolation():
    run = compose_run({"seed": 3, "overrides": "dataset.max_test_samples=${seed}"})
    assert OmegaConf.create(run.yaml).dataset.max_test_samples == 3
    assert "${" not in run.yaml


REFUSALS = {
    "strategy=fedavgg": "strategy='fedavgg' is not one of: ",
    "strategy.name=foo": "strategy.name='foo' is not one of: ",
    "strategy.name=[fedavg]": "strategy.name=['fedavg'] is not one of: ",
    "~strategy": "strategy.name=None is not one of: ",
    "backbone=vit": "backbone='vit' is not one of: clip_base, deit_tiny, ",
    "train=fast": "train='fast' is not one of: default.",
    "strategy.max_age=1": "strategy has no key 'max_age'; it has: name, fraction_train, min_clients, "
    "min_available_clients, wait_for_clients, max_failed_rounds, evaluate_clients, evaluate_every, evaluate_tuned. "
    "It is an option of strategy=pfedla.",
    "schedule.factor=4": "schedule has no key 'factor'; it has: name. It is an option of schedule=fedlama.",
    "train.lrr=1": "train has no key 'lrr'; it has: optimizer, lr, weight_decay, momentum, batch_size, local_epochs, "
    "max_steps, augment, device, precision, compile, channels_last. Did you mean 'lr'?",
    "lr=1": "The config has no key 'lr'; it has: backbone, lora, dataset, partition, train, seed, strategy, "
    "schedule, wire, num_server_rounds, round_timeout, runs_dir, privacy, calibration, record_updates, tracker. Did "
    "you mean 'train.lr' or 'calibration.lr'?",
    "strategy=fedlama strategy.factor=4": "strategy has no key 'factor'; it has: name, fraction_train, min_clients, "
    "min_available_clients, wait_for_clients, max_failed_rounds, evaluate_clients, evaluate_every, evaluate_tuned. Did "
    "you mean 'schedule.factor'?",
    "train.name=x": "train has no key 'name'; it has: optimizer, lr, weight_decay, momentum, batch_size, local_epochs, "
    "max_steps, augment, device, precision, compile, channels_last.",
    "foo=1": "The config has no key 'foo'; it has: backbone, lora, dataset, partition, train, seed, strategy, "
    "schedule, wire, num_server_rounds, round_timeout, runs_dir, privacy, calibration, record_updates, tracker.",
    "+train.foo=1": "train has no key 'foo'; it has: optimizer, ",
    "+foo.bar=1": "The config has no key 'foo'; it has: backbone, ",
    "strategy.nonsense=1": "strategy has no key 'nonsense'; it has: name, fraction_train, min_clients, ",
    "+strategy.nonsense=1": "strategy has no key 'nonsense'; it has: name, fraction_train, min_clients, ",
    "train.lr=abc": "The override 'train.lr=abc' cannot be used: Value 'abc' of type 'str' could not be ",
    "lora.rank=1.5": "The override 'lora.rank=1.5' cannot be used: Value '1.5' of type 'float' could not be ",
    "lora.targets=attn": "The override 'lora.targets=attn' cannot be used: Invalid value assigned: str is not a ",
    "strategy.fraction_train=abc": "strategy.fraction_train: Value 'abc' of type 'str' could not be converted to ",
    "train.lr.x=3": "The override 'train.lr.x=3' cannot be used: ",
    "~train.lr": "The override '~train.lr' cannot be used: ",
    "lora.rank=0": "lora.rank=0 must be at least 1.",
    "train.optimizer=adam": "train.optimizer='adam' is not one of: adamw, sgd.",
    "strategy.fraction_train=2": "strategy.fraction_train=2.0 must be at most 1.0.",
    "num_server_rounds=0": "num_server_rounds=0 must be at least 1.",
    "round_timeout=nan": "round_timeout=nan is not a finite number.",
    "train.lr=[1": "The override 'train.lr=[1' is not of the form key=value: ",
    "train": "The override 'train' is not of the form key=value: ",
    "--help": "The override '--help' is not of the form key=value: ",
    "train.lr='": 'The override "train.lr=\'" is not of the form key=value: ',
    "train=null": "overrides='train=null' cannot be used: ",
    "train.lr=0.1,0.2": "Ambiguous value for argument 'train.lr=0.1,0.2' 1. To use it as a list, use key=[value1",
    "train.lr=${lr}": "train.lr: Interpolation key 'lr' not found.",
    "schedule=fedluar lora.merge=product_svd": "schedule=fedluar repeats the last change of A and B: it does not go "
    "with lora.merge=product_svd, whose SVD gives them another basis in every round.",
    "schedule=fedluar strategy=regmean": "schedule=fedluar repeats the last change of A and B: it does not go with a "
    "strategy that merges products of its own accord, whose SVD ",
}


@pytest.mark.parametrize("overrides", ["train.name=x", "verbose=true", "train.sweep=1"])
def test_nothing_is_suggested_that_several_groups_have_or_hydra_alone(overrides):
    assert "Did you mean" not in refusal(overrides)


@pytest.mark.parametrize(("overrides", "sentence"), REFUSALS.items(), ids=REFUSALS)
def test_a_mistake_is_told_in_one_sentence_with_its_place(overrides, sentence):
    assert refusal(overrides).startswith(sentence)


COMBINATIONS = {
    "strategy=livar strategy.table=nope": "strategy.table='nope' is neither one of cifar100_derived, published nor a ",
    "strategy=livar strategy.variance_model=frozen": "Signals of the frozen model or of raw images are taken after ",
    "strategy=livar strategy.variance_images=raw": "Signals of the frozen model or of raw images are taken after ",
    "strategy=fisher lora.merge=product_svd": "Fisher merges adapters in its own way: lora.merge='product_svd' is not "
    "one of: factors. Set lora.merge=factors.",
    "strategy=regmean lora.merge=product_svd": "RegMean merges adapters in its own way: ",
    "strategy=pfedla lora.merge=product_svd": "PFedLa merges adapters in its own way: ",
    "strategy=heur_pfedla record_updates=true": "record_updates=true needs one model for all, which strategy=heur_",
    "strategy=local record_updates=true": "record_updates=true needs one model for all, which strategy=local has not.",
    "schedule=fedlama record_updates=true": "record_updates=true needs schedule=every_round, not fedlama",
}


@pytest.mark.parametrize(("overrides", "sentence"), COMBINATIONS.items(), ids=COMBINATIONS)
def test_what_does_not_go_together_is_told_before_any_server_is_started(overrides, sentence):
    assert refusal(overrides).startswith(sentence)


def test_a_table_in_a_file_is_left_to_the_server_that_has_it():
    run = compose_run({"strategy": "livar", "overrides": "strategy.table=/on/the/server.yaml"})
    assert run.strategy.table == "/on/the/server.yaml"


@pytest.mark.parametrize(
    ("run_config", "sentence"),
    [
        ({"strategy": "fedporx"}, "strategy='fedporx' is not one of: "),
        ({"strategy": ""}, "strategy='' is not one of: "),
        ({"strategy": "fed=[prox"}, "strategy='fed=[prox' is not one of: "),
        ({"backbone": "../conf/backbone"}, "backbone='../conf/backbone' is not one of: "),
        ({"seed": -1}, "seed=-1 must be at least 0."),
        (
            {"seed": "x"},
            "The override 'seed=\"x\"' cannot be used: Value 'x' of type 'str' could not be converted to Int",
        ),
        ({"num-server-rounds": 1.5}, "The override 'num_server_rounds=1.5' cannot be used: "),
    ],
)
def test_a_wrong_first_class_key_is_told_by_its_name(run_config, sentence):
    assert refusal(**run_config).startswith(sentence)


def test_a_near_miss_gets_a_suggestion():
    assert refusal("strategy=fedporx").endswith("Did you mean 'fedprox'?")
    assert refusal("strategy.name=fedporx").endswith("Did you mean 'fedprox'?")
    assert refusal("strategy.min_client=2").endswith("Did you mean 'min_clients'?")
    assert "Did you mean" not in refusal("strategy=zzz")


def test_the_wrong_one_of_several_overrides_is_named():
    for wrong in ("train.lrr=1", "+train.lrr=1"):
        sentence = refusal(f"strategy.proximal_mu=0.1 lora.rank=4 {wrong}", strategy="fedprox")
        assert sentence.startswith("train has no key 'lrr'")
    sentence = refusal("strategy.proximal_mu=0.1 train.lr=0.1 train.batch_size=x", strategy="fedprox")
    assert sentence.startswith("The override 'train.batch_size=x'")
    assert "proximal_mu" in refusal("strategy.nonsense=1", strategy="fedprox")


@given(st.text(st.characters(exclude_categories=("Cc", "Cs"))))
@example('a "b" \\')
@example('\\"')
@example("[a, {b: 'c'}]=1,2")
@settings(max_examples=50)
def test_any_path_survives_hydras_grammar(path):
    assert OverridesParser.create().parse_override(f"runs_dir={_quoted(path)}").value() == path


words = st.sampled_from([*"+~=,[]{}'\":@$. 1a", "train", "strategy", "lr", "seed", "null", "lora", "/"])


@settings(max_examples=30)
@given(st.lists(words, max_size=8).map("".join))
@example("=3")
@example("strategy=5")
@example("strategy=[fedavg,fedprox]")
@example("+strategy=fedprox")
@example("strategy@x=fedprox")
@example("hydra/launcher=x")
def test_whatever_the_overrides_a_run_or_the_one_error(overrides):
    with contextlib.suppress(ConfigError):
        assert compose_run({"overrides": overrides}).strategy.name in STRATEGIES
