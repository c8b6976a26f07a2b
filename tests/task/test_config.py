"""The schema that travels to clients: what is refused and how, and that JSON keeps everything."""

import contextlib
import dataclasses
import json
import math
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from task.config import MAX_TASK_JSON_BYTES, TaskConfig, bounded, task_from_json, task_to_json, typed, validate
from task.errors import ConfigError

SECTIONS = {item.name: item.default_factory for item in dataclasses.fields(TaskConfig) if item.name != "seed"}
PLAIN = dataclasses.asdict(TaskConfig())


def bounded_fields():
    for section, schema in SECTIONS.items():
        for item in dataclasses.fields(schema):
            if item.metadata:
                yield f"{section}.{item.name}", item
    yield "seed", next(item for item in dataclasses.fields(TaskConfig) if item.name == "seed")


def values_outside(item):
    """Values just outside each bound of a field; of a list, one item outside."""
    default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
    inside = default[0] if isinstance(default, list) else default
    bounds, kind = item.metadata, type(inside)
    outside = [kind(bounds["above"])] if "above" in bounds else []
    outside += [kind(bounds["at_least"]) - kind(1)] if "at_least" in bounds else []
    outside += [kind(bounds["at_most"]) + kind(1)] if "at_most" in bounds else []
    outside += ["nonsense", ""] if "choices" in bounds else []
    outside += [math.nan, math.inf, -math.inf] if kind is float else []
    assert outside, item.name
    return [[inside, inside, value] for value in outside] if isinstance(default, list) else outside


OUTSIDE = [(key, value) for key, item in bounded_fields() for value in values_outside(item)]


def plain_with(key, value):
    """The default config as plain values, with one value replaced."""
    plain = json.loads(json.dumps(PLAIN))
    *path, last = key.split(".")
    node = plain
    for part in path:
        node = node[part]
    node[last] = value
    return plain


def test_every_bounded_field_has_a_default_inside_its_bounds():
    validate(TaskConfig())
    assert len({key for key, _ in OUTSIDE}) >= 25


@pytest.mark.parametrize(("key", "value"), OUTSIDE)
def test_every_value_out_of_range_is_refused_by_its_key(key, value):
    with pytest.raises(ConfigError) as caught:
        typed(TaskConfig, plain_with(key, value))
    sentence = str(caught.value)
    assert sentence.startswith(f"{key}=")
    shown = str(value[-1] if isinstance(value, list) else value)
    assert shown in sentence
    with pytest.raises(ConfigError, match=f"^{key}="):
        task_from_json(json.dumps(plain_with(key, value)))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("lora.rank", 0, "lora.rank=0 must be at least 1."),
        ("train.lr", 0.0, "train.lr=0.0 must be greater than 0.0."),
        ("lora.dropout", 0.95, "lora.dropout=0.95 must be at most 0.9."),
        ("train.lr", math.nan, "train.lr=nan is not a finite number."),
        ("train.optimizer", "adam", "train.optimizer='adam' is not one of: adamw, sgd."),
        ("backbone.mean", [0.5, 0.5], "backbone.mean=[0.5, 0.5] must have 3 items."),
        ("backbone.mean", [[], [], []], "backbone.mean=[[], [], []] must be a list of single values."),
        ("backbone.std", [0.5, 0.5, 0.0], "backbone.std=0.0 must be greater than 0.0."),
    ],
)
def test_a_refusal_says_key_value_and_what_is_allowed(key, value, sentence):
    with pytest.raises(ConfigError) as caught:
        typed(TaskConfig, plain_with(key, value))
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"lora": {"x": 8}}, "lora has no key 'x'; it has: rank, alpha, dropout, targets, units, merge, freeze_a."),
        ({"train": {"momentun": 0}}, "train has no key 'momentun'; it has: "),
        ({"lora.x": {}}, "The config has no key 'lora.x'; it has: backbone, lora, dataset, partition, train, seed."),
        ({"strategy": {}}, "The config has no key 'strategy'; it has: "),
    ],
)
def test_an_unknown_key_is_told_with_those_there_are(values, sentence):
    with pytest.raises(ConfigError) as caught:
        typed(TaskConfig, values)
    assert str(caught.value).startswith(sentence)
    assert ("Did you mean 'momentum'?" in str(caught.value)) == ("momentun" in sentence)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora.rank", "many"),
        ("lora.rank", 1.5),
        ("lora.rank", True),
        ("lora.rank", None),
        ("lora.rank", [8]),
        ("train.lr", "fast"),
        ("train.lr", {"value": 1}),
        ("lora.targets", "attn.qkv"),
        ("backbone.mean", ["a", "b", "c"]),
        ("seed", "x"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_its_key(key, value):
    with pytest.raises(ConfigError, match=rf"^{key}(\[0\])?: "):
        typed(TaskConfig, plain_with(key, value))


def test_a_path_is_put_before_the_keys():
    @dataclasses.dataclass
    class Options:
        share: float = bounded(0.5, above=0.0)

    for values in ({"share": -1.0}, {"share": "x"}, {"shares": 1}):
        with pytest.raises(ConfigError, match=r"^strategy(\.share| has no key 'shares'; it has: share\.)"):
            typed(Options, values, "strategy.")


def test_defaults_are_not_shared_between_configs():
    TaskConfig().backbone.mean.append(1.0)
    TaskConfig().lora.targets.append("x")
    assert TaskConfig() == TaskConfig()
    assert TaskConfig().backbone.mean == [0.5, 0.5, 0.5]


texts = st.text(string.printable, max_size=10).filter(lambda text: "${" not in text and text != "???")
leaves = st.booleans() | st.integers(-1000, 1000) | st.floats(-10, 10) | texts
tasks = st.builds(
    lambda name, arguments, mean, rank, alpha, targets, classes, lr, seed: typed(
        TaskConfig,
        {
            "backbone": {"name": name, "arguments": arguments, "mean": mean},
            "lora": {"rank": rank, "alpha": alpha, "targets": targets},
            "dataset": {"classes": classes},
            "train": {"lr": lr},
            "seed": seed,
        },
    ),
    texts,
    st.dictionaries(st.text(string.ascii_lowercase, min_size=1), leaves | st.lists(leaves, max_size=3), max_size=3),
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.integers(1, 1024),
    st.floats(1e-6, 1e6),
    st.lists(texts, max_size=3),
    st.lists(texts, max_size=3),
    st.floats(1e-12, 1e6),
    st.integers(0, 2**62),
)


@settings(max_examples=25)
@given(tasks)
def test_json_keeps_everything(task):
    text = task_to_json(task)
    assert task_from_json(text) == task
    assert task_to_json(task_from_json(text)) == text


def test_equal_configs_give_equal_text_and_others_other_text():
    arguments = {"depth": 2, "embed_dim": 32}
    one = typed(TaskConfig, {"backbone": {"arguments": arguments}, "train": {"lr": 1}})
    two = typed(TaskConfig, {"train": {"lr": 1.0}, "backbone": {"arguments": dict(reversed(arguments.items()))}})
    assert one == two
    assert task_to_json(one) == task_to_json(two)
    assert task_to_json(one) != task_to_json(TaskConfig())


def test_only_what_clients_need_travels():
    @dataclasses.dataclass
    class Wider(TaskConfig):
        secret: str = "not for clients"

    assert task_to_json(Wider()) == task_to_json(TaskConfig())


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "a${train.lr}b", "${", "\\${x}"])
@pytest.mark.parametrize("hidden", [False, True], ids=["plain", "escaped"])
def test_interpolations_are_never_resolved(value, hidden):
    for plain in (plain_with("backbone.name", value), plain_with("backbone.arguments", {value: 1})):
        text = json.dumps(plain)
        with pytest.raises(ConfigError, match="holds an interpolation"):
            task_from_json(text.replace("$", "\\u0024").replace("${", "\\u0024\\u007b") if hidden else text)


def test_too_long_a_text_is_refused_before_it_is_parsed():
    text = task_to_json(TaskConfig())
    longest = text + " " * (MAX_TASK_JSON_BYTES - len(text))
    assert task_from_json(longest) == TaskConfig()
    with pytest.raises(ConfigError, match="too long"):
        task_from_json(longest + " ")


@pytest.mark.parametrize(
    "text",
    [
        *("", "nonsense", "{", "[]", "1", "null", '"text"', '{"seed": 1} 2', "{'seed': 1}", "\x00"),
        "[" * 60_000,
        '{"a":' * 10_000,
        '{"backbone":{"arguments":' + '{"a":' * 500 + "1" + "}" * 500 + "}}",
        '{"backbone":{"arguments":{"a":' + "[" * 500 + "]" * 500 + "}}}",
        '{"train":{"lr":1' + "0" * 400 + "}}",
        '{"seed":1' + "0" * 5000 + "}",
        '{"lora":{"rank":1e999}}',
    ],
    ids=range(17),
)
def test_what_is_no_config_is_refused_with_the_one_error(text):
    with pytest.raises(ConfigError):
        task_from_json(text)


json_leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
json_values = st.recursive(
    json_leaves | st.sampled_from(["???", "${a}", "_"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from([*SECTIONS, "seed", *(f"{section}.{key}" for section in SECTIONS for key in PLAIN[section])])


@settings(max_examples=60)
@given(keys, json_values)
def test_any_value_anywhere_gives_a_config_or_the_one_error(key, value):
    with contextlib.suppress(ConfigError):
        task = task_from_json(json.dumps(plain_with(key, value)))
        validate(task)
        assert task_to_json(task_from_json(task_to_json(task))) == task_to_json(task)


@given(st.text(max_size=50) | json_values.map(json.dumps))
def test_any_text_gives_a_config_or_the_one_error(text):
    with contextlib.suppress(ConfigError):
        assert isinstance(task_from_json(text), TaskConfig)
