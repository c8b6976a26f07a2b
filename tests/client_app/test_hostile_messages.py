"""Messages of any content: each is an instruction that can be followed, or is refused by an error for people."""

import json

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from client_app.exchanging import received_values
from server_app.compose import compose_run
from task.config import TaskConfig, task_from_json, task_to_json
from task.errors import PetalwiseError
from task.exchange import Exchange
from task.messages import ARRAYS, CONFIG, Instruction
from task.signals import SignalRequest
from task.wire import WireConfig, encode
from tests.strategies.scripted import LAYOUT, Script, ShufflingGrid, scripted_app
from tests.strategies.test_hostile_replies import arrays
from tests.strategies.test_replies import reply

pytestmark = pytest.mark.slow

UNITS = LAYOUT.units
EXCHANGES = [
    Exchange(),
    Exchange(down=UNITS[1:], up=(), start=3, keep=True, moments=True, run="r"),
    Exchange(wire=WireConfig("int8"), run="r"),
    Exchange(up=UNITS[:1], wire=WireConfig("float16", "channel"), run="r"),
]
REQUESTS = [SignalRequest(), SignalRequest(class_variance=True, update_scores=True)]
texts = st.sampled_from([*UNITS, "", "../../etc", "${oc.env:HOME}", "NaN", "tuned", "int8", "channel"]) | st.text(
    max_size=40
)
numbers = st.integers(-(2**63), 2**63 - 1) | st.floats() | st.sampled_from([0, -1, 2**62])
values = st.one_of(texts, numbers, st.booleans(), st.binary(max_size=20), st.lists(texts, min_size=1, max_size=6))
json_values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(autouse=True, scope="module")
def task_of_flower():
    """Flower's messages want to know their task; a grid tells them."""
    ShufflingGrid(scripted_app(Script()), [])


@st.composite
def instructions(draw):
    """A good instruction of which some entries are taken away, replaced or added."""
    exchange, request = draw(st.sampled_from(EXCHANGES)), draw(st.sampled_from(REQUESTS))
    fields = dict(Instruction(2, "{}", LAYOUT.digest, signals=request, exchange=exchange).to_record())
    for _ in range(draw(st.integers(0, 4))):
        known = [*fields, "head-epochs", "start", "keep", "units-up", "wire-dtype"]
        key = draw(st.sampled_from(known) | st.text(max_size=9))
        if draw(st.booleans()):
            fields.pop(key, None)
        elif key == "signals" and draw(st.booleans()):
            fields[key] = json.dumps(draw(json_values))
        else:
            fields[key] = draw(values)
    return ConfigRecord(fields)


@settings(max_examples=5500)
@given(instructions())
def test_an_instruction_can_be_followed_or_is_refused(record):
    try:
        instruction = Instruction.from_record(record)
        instruction.exchange.check(LAYOUT)
    except PetalwiseError:
        return
    exchange = instruction.exchange
    assert instruction.proximal_mu >= 0
    assert 0 <= instruction.head_epochs <= 1000
    assert exchange.start >= 0
    assert exchange.run or not (exchange.start or exchange.keep or exchange.wire.lossy)
    for units in (exchange.down, exchange.up):
        assert units is None or set(units) <= set(UNITS)


class Model:
    layout = LAYOUT


@settings(max_examples=4000)
@given(st.sampled_from(EXCHANGES), st.none() | st.sampled_from(["flat", "scale", "x"]), arrays, st.booleans())
def test_the_received_values_are_those_announced_or_are_refused(exchange, name, array, extra):
    part = LAYOUT.part(exchange.down)
    found = dict(encode(torch.linspace(-1, 1, part.size), part, exchange.wire))
    found |= {name: array} if name else {}
    if extra:
        found["more"] = Array(dtype="float32", shape=(1,), stype="numpy.ndarray", data=b"")
    message = reply(RecordDict({ARRAYS: ArrayRecord(found), CONFIG: ConfigRecord({})}))
    try:
        received = received_values(message, Model(), exchange)
    except PetalwiseError:
        return
    assert received.shape == (part.size,)
    assert received.dtype == torch.float32


@pytest.fixture(scope="module")
def task():
    return json.loads(task_to_json(compose_run({}).settings))


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_a_task_is_valid_or_refused(task, data):
    changed = json.loads(json.dumps(task))
    for _ in range(data.draw(st.integers(1, 3))):
        where = changed
        while isinstance(where, dict) and where:
            key = data.draw(st.sampled_from(sorted(where)))
            if not isinstance(where[key], dict) or data.draw(st.integers(0, 3)) == 0:
                where[key] = data.draw(json_values)
                break
            where = where[key]
    try:
        found = task_from_json(json.dumps(changed))
    except PetalwiseError:
        return
    assert isinstance(found, TaskConfig)


@settings(max_examples=500)
@given(st.text(max_size=200) | st.binary(max_size=50).map(lambda raw: raw.decode("latin-1")))
def test_a_task_that_is_no_json_is_refused(text):
    with pytest.raises(PetalwiseError):
        task_from_json(text)
