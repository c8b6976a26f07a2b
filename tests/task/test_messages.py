"""The message contract: arrays bit for bit without copies, and all else refused with one kind of error."""

import io
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from task.arrays import FLAT, array_to_flat, flat_to_array
from task.errors import ConfigError, MessageError
from task.messages import (
    ARRAYS,
    CONFIG,
    METRICS,
    SIGNALS,
    Instruction,
    content_bytes,
    flat_content,
    number_field,
    received_config,
    received_flat,
    received_metrics,
    text_field,
)
from task.signals import NOTHING, SignalRequest
from tests.task.test_signals import requests

floats = st.floats(width=32)
flats = npst.arrays(np.float32, st.integers(0, 300), elements=floats)
SIZE = 40
VALID = flat_to_array(np.arange(SIZE, dtype=np.float32)).data
HEADER = len(VALID) - 4 * SIZE


def array_of(data: bytes) -> Array:
    return Array(dtype="float32", shape=(SIZE,), stype="numpy.ndarray", data=data)


def npy(values: np.ndarray, version=None, allow_pickle=True) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.lib.format.write_array(buffer, values, version, allow_pickle)
    return buffer.getvalue()


def assert_read_or_refused(data: bytes) -> None:
    """Whatever arrives, it is exactly what was asked for or a MessageError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy's parser, on headers that look like Python 2's
        try:
            flat = array_to_flat(array_of(data), SIZE)
        except MessageError:
            return
    assert flat.shape == (SIZE,)
    assert flat.dtype == np.float32
    assert data.endswith(flat.tobytes())


@given(flats)
def test_a_flat_array_arrives_bit_for_bit_as_a_read_only_view(flat):
    array = flat_to_array(flat)
    received = array_to_flat(array, flat.size)
    assert received.tobytes() == flat.tobytes()
    assert received.dtype == np.float32
    assert not received.flags.writeable
    assert flat.size == 0 or np.shares_memory(received, np.frombuffer(array.data, np.uint8))


@given(flats)
def test_the_format_is_flowers_own(flat):
    assert flat_to_array(flat).data == Array(flat).data
    np.testing.assert_array_equal(flat_to_array(flat).numpy(), flat)
    np.testing.assert_array_equal(array_to_flat(Array(flat), flat.size), flat)


def test_values_that_do_not_lie_together_are_gathered():
    values = np.arange(10, dtype=np.float64)[::2]
    np.testing.assert_array_equal(array_to_flat(flat_to_array(values), 5), [0, 2, 4, 6, 8])


@pytest.mark.parametrize("dtype", ["float64", "float16", ">f4", "int32", "complex64", "bool", "S4", "V4"])
def test_another_dtype_is_refused(dtype):
    with pytest.raises(MessageError, match="has dtype .*, expected float32"):
        array_to_flat(array_of(npy(np.zeros(SIZE, dtype=dtype))), SIZE)


@pytest.mark.parametrize("shape", [(SIZE - 1,), (SIZE + 1,), (SIZE, 1), (1, SIZE), (5, 8), (0,), ()], ids=str)
def test_another_shape_is_refused(shape):
    with pytest.raises(MessageError, match=rf"has shape .*, expected \[{SIZE}\]"):
        array_to_flat(array_of(npy(np.zeros(shape, dtype=np.float32))), SIZE)


@given(st.integers(0, len(VALID) - 1))
def test_truncated_bytes_are_refused(length):
    with pytest.raises(MessageError):
        array_to_flat(array_of(VALID[:length]), SIZE)


@given(st.binary(min_size=1, max_size=9))
def test_further_bytes_are_refused(further):
    with pytest.raises(MessageError, match=rf"holds {4 * SIZE + len(further)} bytes, expected {4 * SIZE}"):
        array_to_flat(array_of(VALID + further), SIZE)


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_pickled_objects_are_refused_and_never_unpickled():
    with pytest.raises(MessageError, match="dtype object"):
        array_to_flat(array_of(npy(np.array([_Bomb()] * SIZE, dtype=object))), SIZE)


@pytest.mark.parametrize("version", [(2, 0), (3, 0)])
def test_later_versions_of_the_format_are_refused(version):
    with pytest.raises(MessageError, match="version 1.0"):
        array_to_flat(array_of(npy(np.zeros(SIZE, dtype=np.float32), version)), SIZE)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "{",
        "(" * 5000,
        "[" * 9000,
        "'" * 100,
        "{'descr': '<f4', 'fortran_order': False, 'shape': (40,)",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (40.0,), }",
        "{'descr': '<f4', 'fortran_order': False}",
        "{'descr': (), 'fortran_order': False, 'shape': (40,), }",
        "{'descr': [()], 'fortran_order': False, 'shape': (40,), }",
        "{'descr': ('<f4', (2, -1)), 'fortran_order': False, 'shape': (40,), }",
        "{'descr': '<f99999999999', 'fortran_order': False, 'shape': (40,), }",
        "{[]: 1}",
        "  \n\tif:\n  'x",
        "0x" + "f" * 5000,
        "1" * 5000,
        "\x00\x00",
    ],
    ids=range(17),
)
def test_broken_headers_are_refused_with_the_one_error(header):
    content = header.encode("latin1")
    with pytest.raises(MessageError, match="header cannot be read"):
        array_to_flat(array_of(VALID[:8] + len(content).to_bytes(2, "little") + content + VALID[HEADER:]), SIZE)


@given(st.binary(max_size=300))
def test_garbage_is_refused_with_the_one_error(data):
    assert_read_or_refused(data)


@given(st.text(st.characters(max_codepoint=255), max_size=120))
def test_garbage_in_a_header_is_refused_with_the_one_error(text):
    content = text.encode("latin1")
    assert_read_or_refused(VALID[:8] + len(content).to_bytes(2, "little") + content + VALID[HEADER:])


@given(st.lists(st.tuples(st.integers(0, HEADER + 8), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_header_is_refused_with_the_one_error(damages):
    data = bytearray(VALID)
    for position, value in damages:
        data[position] = value
    assert_read_or_refused(bytes(data))


instructions = st.builds(
    Instruction,
    server_round=st.integers(0, 2**31),
    task=st.text(st.characters(codec="utf-8")),
    layout=st.text(st.characters(codec="utf-8")),
    proximal_mu=st.floats(0, 1e6),
    head_epochs=st.integers(0, 1000),
    evaluate=st.sampled_from(["none", "received"]),
    signals=requests,
)


@given(instructions)
def test_an_instruction_arrives_as_it_was_sent(instruction):
    sent = RecordDict({CONFIG: instruction.to_record()})
    received = ConfigRecord.inflate(sent[CONFIG].deflate())
    assert Instruction.from_record(received) == instruction


def test_an_instruction_may_come_with_further_entries():
    instruction = Instruction(1, "{}", "digest")
    assert Instruction.from_record(ConfigRecord({"mine": 3, **instruction.to_record()})) == instruction


@pytest.mark.parametrize("key", list(Instruction(1, "{}", "digest").to_record()))
@pytest.mark.parametrize("wrong", [None, b"bytes", [1], True])
def test_an_instruction_with_a_wrong_field_is_refused_by_name(key, wrong):
    record = Instruction(1, "{}", "digest").to_record()
    if wrong is None:
        del record[key]
    else:
        record[key] = wrong
    with pytest.raises(MessageError, match=f"'{key}'"):
        Instruction.from_record(record)


def test_an_instruction_asks_for_no_signals_by_default():
    record = Instruction(1, "{}", "digest").to_record()
    assert record["signals"] == "{}"
    assert Instruction.from_record(record).signals == NOTHING


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "not JSON"), ('{"gramm": true}', "no key 'gramm'"), ('{"model": "frozen"}', "after training")],
)
def test_an_instruction_whose_signals_cannot_be_followed_is_refused(text, reason):
    record = Instruction(1, "{}", "digest", signals=SignalRequest(gram=True)).to_record()
    record["signals"] = text
    with pytest.raises(ConfigError, match=reason):
        Instruction.from_record(record)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), "1", True, [1.0]])
def test_a_number_must_be_a_finite_number(wrong):
    with pytest.raises(MessageError, match=r"'loss' is .*, not a finite number"):
        number_field(ConfigRecord({"loss": wrong}), "loss")


def test_fields_are_read_as_they_are():
    record = ConfigRecord({"number": 2.5, "count": 3, "text": "words"})
    assert (number_field(record, "number"), number_field(record, "count")) == (2.5, 3)
    assert text_field(record, "text") == "words"


def message(content: RecordDict) -> SimpleNamespace:
    """A stand-in: Flower makes messages only inside a run."""
    return SimpleNamespace(content=content)


def test_content_shares_one_array_among_messages():
    array = flat_to_array(np.zeros(3, dtype=np.float32))
    contents = [flat_content(array, Instruction(1, "{}", "digest")) for _ in range(2)]
    assert all(content[ARRAYS][FLAT].data is array.data for content in contents)
    assert received_flat(message(contents[0]), 3).tolist() == [0, 0, 0]
    assert Instruction.from_record(received_config(message(contents[1]))) == Instruction(1, "{}", "digest")


@pytest.mark.parametrize(
    "arrays",
    [None, ArrayRecord(), ArrayRecord({"other": Array(np.zeros(3, dtype=np.float32))})],
    ids=["none", "empty", "other"],
)
def test_a_message_without_the_one_array_is_refused(arrays):
    content = RecordDict({} if arrays is None else {ARRAYS: arrays})
    with pytest.raises(MessageError, match="Expected one array named 'flat'"):
        received_flat(message(content), 3)


def test_a_message_with_a_second_array_is_refused():
    arrays = {FLAT: Array(np.zeros(3, dtype=np.float32)), "more": Array(np.zeros(3, dtype=np.float32))}
    with pytest.raises(MessageError, match="flat, more"):
        received_flat(message(RecordDict({ARRAYS: ArrayRecord(arrays)})), 3)


def test_the_record_of_signals_is_read_apart_from_that_of_the_model():
    content = RecordDict(
        {
            ARRAYS: ArrayRecord({FLAT: flat_to_array(np.zeros(3))}),
            SIGNALS: ArrayRecord({FLAT: flat_to_array(np.ones(2))}),
        }
    )
    assert received_flat(message(content), 3).tolist() == [0, 0, 0]
    assert received_flat(message(content), 2, SIGNALS).tolist() == [1, 1]
    with pytest.raises(MessageError, match=r"has shape \[2\], expected \[3\]"):
        received_flat(message(content), 3, SIGNALS)
    del content[SIGNALS]
    with pytest.raises(MessageError, match="in 'signals', got: none"):
        received_flat(message(content), 2, SIGNALS)


def test_missing_records_are_told_by_name():
    with pytest.raises(MessageError, match="'config'"):
        received_config(message(RecordDict({"other": ConfigRecord({})})))
    with pytest.raises(MessageError, match="'metrics'"):
        received_metrics(message(RecordDict()))
    metrics = MetricRecord({"loss": 0.5})
    assert received_metrics(message(RecordDict({METRICS: metrics}))) == metrics


@given(st.integers(0, 1000), st.text(st.characters(codec="utf-8"), max_size=20))
def test_content_bytes_counts_arrays_as_sent_and_records_as_serialised(size, text):
    array, config, metrics = Array(np.zeros(size, np.float32)), ConfigRecord({"t": text}), MetricRecord({"m": 1.0})
    content = RecordDict({ARRAYS: ArrayRecord({FLAT: array}), CONFIG: config, METRICS: metrics})
    expected = len(array.data) + len(config.deflate()) + len(metrics.deflate())
    assert content_bytes(content) == expected
    assert content_bytes(RecordDict({ARRAYS: ArrayRecord({FLAT: array, "b": array})})) == 2 * len(array.data)
    assert content_bytes(RecordDict()) == 0
