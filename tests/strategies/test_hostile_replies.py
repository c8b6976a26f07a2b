"""Replies of any content: each is a valid update, or is refused by the one error that drops a client."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.codec import Codec
from strategies.cohort import ClientDirectory
from strategies.context import TaskContext
from strategies.replies import check_evaluation, check_moments, check_update
from task.arrays import FLAT, flat_to_array
from task.errors import MessageError
from task.messages import ARRAYS, CONFIG, METRICS, SIGNALS
from task.signals import NOTHING, SignalRequest, signal_layout
from task.wire import SCALE, WireConfig, encode
from tests.strategies.scripted import BASE, CLASSES, LAYOUT, Script, ShufflingGrid, initial_arrays, scripted_app
from tests.strategies.test_replies import reply

pytestmark = pytest.mark.slow

SCORES = SignalRequest(update_scores=True)
MOMENTS = SignalRequest(class_moments="diagonal", taken="after")
WIRES = [WireConfig(), WireConfig("float16"), WireConfig("int8")]
HUGE = 2**62


@pytest.fixture(autouse=True, scope="module")
def task_of_flower():
    """Flower's messages want to know their task; a grid tells them."""
    ShufflingGrid(scripted_app(Script()), [])


def good(wire, request):
    values = torch.linspace(-1, 1, LAYOUT.size)
    layout = signal_layout(request, LAYOUT)
    numbers = {"num-examples": 7, "accuracy": 0.5, "loss": 1.0, "train-loss": 0.5}
    config = {"base": BASE, "layout": LAYOUT.digest, "client": "1", "classes": CLASSES, "share": ""}
    return {
        ARRAYS: dict(encode(values, LAYOUT, wire)),
        SIGNALS: {FLAT: flat_to_array(np.ones(layout.size, np.float32))},
        METRICS: numbers,
        CONFIG: config,
    }


names = st.sampled_from([FLAT, SCALE, "num-examples", "accuracy", "loss", "base", "layout", "client", "x"])
shapes = st.lists(st.integers(-1, 3) | st.just(LAYOUT.size) | st.just(HUGE), max_size=3).map(tuple)
header = st.builds(
    lambda descr, order, shape: str({"descr": descr, "fortran_order": order, "shape": shape}).encode(),
    st.sampled_from(["<f4", "<f8", "|O", "|i1", "<f2", ">f4", "|V8", "<U9999999"]),
    st.booleans(),
    shapes,
)
npy = st.builds(
    lambda text, version, body: b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + body,
    header | st.binary(max_size=40),
    st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x09\x09"]),
    st.binary(max_size=60) | st.just(bytes(4 * LAYOUT.size)) | st.just(b"\xff" * 4 * LAYOUT.size),
)
arrays = st.builds(
    Array,
    dtype=st.sampled_from(["float32", "float64", "int8", "object", "nonsense"]),
    shape=shapes,
    stype=st.sampled_from(["numpy.ndarray", "pickle"]),
    data=npy | st.binary(max_size=100),
)
numbers = st.one_of(st.integers(-3, 3), st.sampled_from([HUGE, -HUGE]), st.floats(), st.lists(st.floats(), max_size=3))
values = st.one_of(numbers, st.text(max_size=80), st.booleans(), st.binary(max_size=9), st.lists(st.text(), max_size=2))
KINDS = {
    ARRAYS: (ArrayRecord, arrays),
    SIGNALS: (ArrayRecord, arrays),
    METRICS: (MetricRecord, numbers),
    CONFIG: (ConfigRecord, values),
}


@st.composite
def contents(draw, request):
    """A good reply with some of its entries and records taken away, renamed or replaced."""
    wire = draw(st.sampled_from(WIRES))
    content, kinds = good(wire, request), dict(KINDS)
    for _ in range(draw(st.integers(0, 4))):
        where = draw(st.sampled_from(sorted(content)) if content else st.just(""))
        if not where:
            break
        kind = draw(st.sampled_from(["drop record", "rename record", "drop entry", "set entry"]))
        record = content[where]
        if kind == "drop record":
            del content[where]
        elif kind == "rename record":
            content["other"], kinds["other"] = content.pop(where), kinds[where]
        elif kind == "drop entry" and record:
            del record[draw(st.sampled_from(sorted(record)))]
        else:
            record[draw(names)] = draw(kinds[where][1])
    return wire, RecordDict({name: kinds[name][0](entries) for name, entries in content.items()})


@settings(max_examples=4000)
@given(contents(SCORES), st.sampled_from([NOTHING, SCORES]))
def test_an_update_is_valid_or_refused(made, request):
    wire, content = made
    codec = Codec(initial_arrays(), LAYOUT, wire)
    try:
        update = check_update(reply(content), "1", codec, BASE, request)
    except MessageError:
        return
    assert update.flat.shape == (LAYOUT.size,)
    assert bool(torch.isfinite(update.flat).all())
    assert isinstance(update.num_examples, int)
    assert update.num_examples >= 1


@settings(max_examples=2000)
@given(contents(MOMENTS))
def test_moments_are_valid_or_refused(made):
    try:
        found = check_moments(reply(made[1]), Codec(initial_arrays(), LAYOUT), BASE, MOMENTS)
    except MessageError:
        return
    assert all(bool(torch.isfinite(values).all()) for values in found.values())


@settings(max_examples=2000)
@given(contents(NOTHING))
def test_an_evaluation_is_valid_or_refused(made):
    try:
        found = check_evaluation(reply(made[1]), "1")
    except MessageError:
        return
    assert 0.0 <= found.accuracy <= 1.0
    assert found.num_examples >= 1


class AnsweringGrid:
    """Answers every question with one content."""

    def __init__(self, content):
        self._content = content

    def get_node_ids(self):
        return [1]

    def send_and_receive(self, messages, *, timeout=None):
        (message,) = messages
        message.metadata.__dict__["_message_id"] = "to 1"
        return [reply(self._content)]


@settings(max_examples=2000)
@given(contents(NOTHING))
def test_whoever_answers_is_admitted_or_refused_under_a_name_that_can_be_shown(made):
    directory = ClientDirectory()
    content = made[1]
    try:
        sent = directory.discover(AnsweringGrid(content), TaskContext("{}", base=BASE), LAYOUT.digest, 1.0)
    except MessageError:
        pytest.fail("a single node must not stop the others")
    assert len(sent) == 2
    assert len(directory.nodes) + len(directory.refused) == 1
    shown = [*directory.nodes, *directory.refusals]
    assert all(name.isprintable() for name in shown)
