"""What an instruction says of units, kept values and the wire: it arrives as written, or is refused."""

import re
from dataclasses import replace

import pytest
from flwr.app import ConfigRecord
from hypothesis import given
from hypothesis import strategies as st

from task.errors import ConfigError, MessageError
from task.exchange import EVERYTHING, MAX_RUN_NAME, Exchange, units_or_none
from task.messages import Instruction
from task.units import make_layout
from task.wire import EXACT, WireConfig

UNITS = ("blocks.0", "blocks.1", "head")
LAYOUT = make_layout(
    {
        "blocks.0.attn.qkv.lora_A.weight": (2, 3),
        "blocks.1.attn.qkv.lora_A.weight": (2, 3),
        "head.weight": (5, 2),
        "head.bias": (5,),
    }
)

texts = st.text(st.characters(codec="utf-8"), max_size=10)
names = st.none() | st.lists(texts, max_size=4).map(tuple)
formats = st.just(EXACT) | st.builds(
    WireConfig, dtype=st.sampled_from(["float16", "int8"]), scale=st.sampled_from(["tensor", "channel"])
)
exchanges = st.builds(
    Exchange,
    down=names,
    up=names,
    start=st.integers(0, 2**31),
    keep=st.booleans(),
    moments=st.booleans(),
    run=st.text(st.characters(codec="utf-8"), min_size=1, max_size=MAX_RUN_NAME),
    wire=formats,
)


def received(exchange):
    """Read an exchange as it arrives: written into a Flower record that went through Flower's own format."""
    return Exchange.from_record(ConfigRecord.inflate(ConfigRecord(exchange.to_fields()).deflate()))


@given(exchanges)
def test_an_exchange_arrives_as_it_was_written(exchange):
    assert received(exchange) == exchange


@given(exchanges)
def test_an_instruction_carries_its_exchange(exchange):
    instruction = Instruction(3, "{}", "digest", exchange=exchange)
    record = ConfigRecord.inflate(instruction.to_record().deflate())
    assert Instruction.from_record(record) == instruction


def test_by_default_nothing_is_written_and_everything_travels():
    assert EVERYTHING.to_fields() == {}
    assert Exchange.from_record(ConfigRecord()) == EVERYTHING == Exchange()
    assert Exchange.from_record(Instruction(1, "{}", "digest").to_record()) == EVERYTHING


def test_an_instruction_is_no_longer_for_an_exchange_of_everything():
    plain = Instruction(1, "{}", "digest").to_record()
    assert set(plain) == {"server-round", "task", "layout", "proximal-mu", "evaluate", "signals"}


@pytest.mark.parametrize(
    ("exchange", "fields"),
    [
        (Exchange(down=()), {"units-down": []}),
        (Exchange(up=("head",)), {"units-up": ["head"]}),
        (Exchange(start=2, run="r"), {"start": 2, "run": "r"}),
        (Exchange(keep=True, run="r"), {"keep": True, "run": "r"}),
        (Exchange(moments=True), {"moments": True}),
        (
            Exchange(run="r", wire=WireConfig("int8", "tensor")),
            {"run": "r", "wire-dtype": "int8", "wire-scale": "tensor"},
        ),
        (Exchange(wire=WireConfig("float32", "tensor")), {}),
    ],
)
def test_only_what_differs_from_the_default_is_written(exchange, fields):
    assert exchange.to_fields() == fields


@pytest.mark.parametrize("start", [-1, 1.0, "1", True, b"1", [1]])
def test_a_start_that_is_no_round_is_refused(start):
    with pytest.raises(MessageError, match="start="):
        Exchange.from_record(ConfigRecord({"start": start, "run": "r"}))


@pytest.mark.parametrize("key", ["keep", "moments"])
@pytest.mark.parametrize("value", [1, 0, "yes", 1.0, [True]])
def test_what_to_keep_is_yes_or_no(key, value):
    with pytest.raises(MessageError, match=re.escape(f"{key}={value!r}")):
        Exchange.from_record(ConfigRecord({key: value, "run": "r"}))


@pytest.mark.parametrize("run", [None, "", 1, True, b"r", ["r"], "r" * (MAX_RUN_NAME + 1)])
@pytest.mark.parametrize("fields", [{"keep": True}, {"start": 1}, {"wire-dtype": "int8"}, {"wire-dtype": "float16"}])
def test_kept_values_without_the_name_of_a_run_are_refused(run, fields):
    record = ConfigRecord(fields if run is None else {**fields, "run": run})
    with pytest.raises(MessageError, match="name of the run"):
        Exchange.from_record(record)


@pytest.mark.parametrize("run", [1, ["r"], "r" * (MAX_RUN_NAME + 1)])
def test_a_run_with_no_proper_name_is_refused_even_where_nothing_is_kept(run):
    with pytest.raises(MessageError, match="name of the run"):
        Exchange.from_record(ConfigRecord({"run": run}))


@pytest.mark.parametrize("key", ["units-down", "units-up"])
@pytest.mark.parametrize("value", ["head", 1, True, b"head", [1], [b"head"], [1.5]])
def test_units_that_are_no_list_of_names_are_refused_by_the_field(key, value):
    with pytest.raises(MessageError, match=f"'{key}'"):
        Exchange.from_record(ConfigRecord({key: value}))


@pytest.mark.parametrize("key", ["wire-dtype", "wire-scale"])
@pytest.mark.parametrize("value", ["float64", "", "INT8", 1, True, 1.5, b"int8", ["int8"], "${dtype}", "${nothing:x}"])
def test_an_unknown_wire_format_is_refused(key, value):
    with pytest.raises((ConfigError, MessageError)):
        Exchange.from_record(ConfigRecord({key: value, "run": "r"}))


@pytest.mark.parametrize("key", ["wire-dtype", "wire-scale"])
def test_an_interpolation_is_never_resolved(key, monkeypatch):
    """The error goes back to the server: it must not tell this machine's environment."""
    monkeypatch.setenv("MINE_ALONE", "hunter2")
    with pytest.raises(ConfigError) as error:
        Exchange.from_record(ConfigRecord({key: "${oc.env:MINE_ALONE}", "run": "r"}))
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("key", ["wire-dtype", "wire-scale"])
def test_a_missing_values_mark_is_no_wire_format(key):
    with pytest.raises(ConfigError):
        Exchange.from_record(ConfigRecord({key: "???", "run": "r"}))


def test_a_bad_exchange_is_refused_along_with_its_instruction():
    record = Instruction(1, "{}", "digest").to_record()
    record["keep"] = True
    with pytest.raises(MessageError, match="name of the run"):
        Instruction.from_record(record)


@pytest.mark.parametrize(
    "exchange",
    [
        EVERYTHING,
        Exchange(down=UNITS, up=UNITS),
        Exchange(up=()),
        Exchange(up=("blocks.1", "head")),
        Exchange(down=(), start=1),
        Exchange(down=("blocks.0", "head"), up=("blocks.1",), start=1),
    ],
)
def test_units_of_the_layout_in_its_order_pass(exchange):
    exchange.check(LAYOUT)


@pytest.mark.parametrize("units", [("blocks.2",), ("",), ("blocks.0", "x", "head"), ("head.weight",)], ids=str)
@pytest.mark.parametrize("way", ["down", "up"])
def test_an_unknown_unit_is_refused_by_name(way, units):
    with pytest.raises(MessageError, match=f"units {', '.join(units)} are not those of the layout"):
        replace(Exchange(start=1), **{way: units}).check(LAYOUT)


@pytest.mark.parametrize("units", [("head", "blocks.0"), UNITS[::-1], ("head", "head")], ids=str)
@pytest.mark.parametrize("way", ["down", "up"])
def test_units_in_another_order_or_twice_are_refused(way, units):
    with pytest.raises(MessageError, match="not those of the layout in its order"):
        replace(Exchange(start=1), **{way: units}).check(LAYOUT)


@pytest.mark.parametrize("units", [(), ("head",), UNITS[:2]], ids=str)
def test_missing_units_without_a_start_are_refused(units):
    with pytest.raises(MessageError, match="go on from kept values"):
        Exchange(down=units).check(LAYOUT)
    Exchange(down=units, start=1).check(LAYOUT)
    Exchange(up=units).check(LAYOUT)


def test_a_long_list_of_unknown_units_is_told_in_short():
    with pytest.raises(MessageError) as error:
        Exchange(up=("x" * 1000,) * 50).check(LAYOUT)
    assert len(str(error.value)) < 300


@given(st.lists(st.sampled_from([*UNITS, "unknown"])))
def test_units_are_named_in_order_and_all_of_them_by_none(units):
    chosen = units_or_none(units, LAYOUT)
    assert (chosen is None) == (set(units) >= set(UNITS))
    if chosen is not None:
        assert chosen == tuple(unit for unit in UNITS if unit in units)
    Exchange(up=chosen).check(LAYOUT)
