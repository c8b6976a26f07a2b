"""Values on the wire: exact, as halves or as bytes with scales, and all else refused with one kind of error."""

import warnings

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from task.arrays import FLAT, flat_to_array
from task.config import validate
from task.errors import ConfigError, MessageError
from task.units import Layout, make_layout
from task.wire import EXACT, LARGEST, SCALE, WireConfig, decode, encode, num_bytes, num_scales
from tests.task.test_units import granularities, models

HALF = WireConfig("float16")
BY_TENSOR, BY_CHANNEL = WireConfig("int8", "tensor"), WireConfig("int8", "channel")
WIRES = [EXACT, WireConfig("float32", "tensor"), HALF, WireConfig("float16", "tensor"), BY_TENSOR, BY_CHANNEL]
LOSSY = [HALF, BY_TENSOR, BY_CHANNEL]
WIDE, TALL = "blocks.0.attn.qkv.lora_A.weight", "blocks.0.attn.qkv.lora_B.weight"
LAYOUT = make_layout({WIDE: (2, 5), TALL: (6, 3), "head.weight": (4, 4), "head.bias": (4,)})

wires = st.sampled_from(WIRES)
layouts = st.builds(make_layout, models, granularities)


def named(wire):
    return f"{wire.dtype}-{wire.scale}"


@st.composite
def layouts_and_values(draw, largest=1e30):
    """A layout and float32 values up to a size, none so small that the steps of int8 are themselves rounded."""
    layout = draw(layouts)
    bound = float(np.float32(largest))
    elements = st.floats(-bound, bound, width=32, allow_subnormal=False)
    return layout, torch.from_numpy(draw(npst.arrays(np.float32, layout.size, elements=elements)))


def through(values, layout, wire):
    return decode(encode(values, layout, wire), layout, wire)


def values_of(layout, seed=0):
    return torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))


def steps_of(values, layout, wire):
    """Of every value the step of int8 in its tensor or channel, by the definition."""
    steps = []
    for view in layout.views(values.double()).values():
        largest = view.abs().max().expand(view.shape)
        if wire.scale == "channel" and view.dim() == 2:
            largest = view.abs().amax(1 if len(view) <= len(view.T) else 0, keepdim=True).expand(view.shape)
        steps.append(largest.flatten() / LARGEST)
    return torch.cat(steps)


def payload(array):
    """Bytes of an array after the header of NumPy's format 1.0."""
    return len(array.data) - 10 - int.from_bytes(array.data[8:10], "little")


@given(layouts_and_values())
def test_float32_arrives_bit_for_bit_as_a_view(given):
    layout, values = given
    record = encode(values, layout, EXACT)
    decoded = decode(record, layout, EXACT)
    assert list(record) == [FLAT]
    assert decoded.numpy().tobytes() == values.numpy().tobytes()
    assert np.shares_memory(decoded.numpy(), np.frombuffer(record[FLAT].data, np.uint8))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 3.4e38])
def test_float32_keeps_every_kind_of_number(value):
    values = torch.full((LAYOUT.size,), value)
    assert through(values, LAYOUT, EXACT).numpy().tobytes() == values.numpy().tobytes()


@given(layouts_and_values(65504))
def test_float16_arrives_rounded_to_half_precision(given):
    layout, values = given
    decoded = through(values, layout, HALF)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, values.half().float())
    assert ((decoded - values).abs() <= torch.clamp(values.abs() * 2**-11, min=2**-25)).all()


@given(layouts_and_values(), st.sampled_from([BY_TENSOR, BY_CHANNEL]))
def test_int8_is_off_by_half_a_step_of_its_scale_at_most(given, wire):
    layout, values = given
    decoded = through(values, layout, wire)
    assert decoded.dtype == torch.float32
    error = (decoded.double() - values.double()).abs()
    assert (error <= 0.501 * steps_of(values, layout, wire)).all()


@given(layouts_and_values(60000), wires)
def test_what_arrived_once_is_the_same_when_sent_on(given, wire):
    layout, values = given
    once = through(values, layout, wire)
    torch.testing.assert_close(through(once, layout, wire), once, rtol=1e-5, atol=0)


@given(layouts_and_values(), wires)
def test_what_is_sent_is_not_changed(given, wire):
    layout, values = given
    before = values.clone()
    encode(values, layout, wire)
    assert torch.equal(values, before)


@pytest.mark.parametrize("wire", [BY_TENSOR, BY_CHANNEL], ids=named)
def test_the_largest_value_of_a_scale_arrives_almost_exactly(wire):
    values = values_of(LAYOUT)
    largest = values.abs().double() >= LARGEST * steps_of(values, LAYOUT, wire) * (1 - 1e-6)
    assert largest.sum() == num_scales(LAYOUT, wire)
    torch.testing.assert_close(through(values, LAYOUT, wire)[largest], values[largest], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("shape", "count"),
    [((2, 5), 2), ((5, 2), 2), ((3, 3), 3), ((1, 4), 1), ((7,), 1), ((), 1), ((2, 3, 4), 1)],
    ids=str,
)
def test_channels_lie_along_the_shorter_side_of_a_matrix(shape, count):
    layout = make_layout({"head.weight": shape})
    assert num_scales(layout, BY_CHANNEL) == count
    assert num_scales(layout, BY_TENSOR) == 1


@pytest.mark.parametrize("shape", [(2, 300), (300, 2), (2, 2)], ids=str)
def test_a_channel_of_small_values_is_as_exact_as_one_of_large_ones(shape):
    layout = make_layout({"head.weight": shape})
    sizes = torch.tensor([1e-6, 1e6])
    values = values_of(layout).view(shape) * (sizes[:, None] if shape[0] <= shape[1] else sizes)
    decoded = through(values.flatten(), layout, BY_CHANNEL).view(shape)
    across = 1 if shape[0] <= shape[1] else 0
    worst = ((decoded - values).abs().amax(across) / values.abs().amax(across)).tolist()
    assert max(worst) <= 0.501 / LARGEST
    assert (through(values.flatten(), layout, BY_TENSOR).abs() < 1e-3).sum() >= values.numel() // 2


def test_tensors_have_scales_of_their_own():
    values = values_of(LAYOUT)
    values[LAYOUT.slices["head"]] *= 1e6
    block = LAYOUT.slices["blocks.0"]
    assert (through(values, LAYOUT, BY_TENSOR)[block] - values[block]).abs().max() < 0.02


@pytest.mark.parametrize("wire", WIRES, ids=named)
def test_zeros_arrive_as_zeros(wire):
    assert torch.equal(through(torch.zeros(LAYOUT.size), LAYOUT, wire), torch.zeros(LAYOUT.size))


@pytest.mark.parametrize("wire", WIRES, ids=named)
def test_a_tensor_of_zeros_beside_others_stays_zero(wire):
    values = values_of(LAYOUT)
    values[LAYOUT.slices["head"]] = 0
    decoded = through(values, LAYOUT, wire)
    assert (decoded[LAYOUT.slices["head"]] == 0).all()
    assert (decoded[LAYOUT.slices["blocks.0"]] != 0).any()


@pytest.mark.parametrize("wire", WIRES, ids=named)
def test_an_empty_layout_travels(wire):
    assert through(torch.empty(0), Layout(()), wire).shape == (0,)
    assert num_bytes(Layout(()), wire) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 65520.0, -1e30])
def test_float16_says_by_infinity_or_nan_what_it_cannot_hold(value):
    values = values_of(LAYOUT)
    values[3] = value
    decoded = through(values, LAYOUT, HALF)
    assert torch.isfinite(decoded).tolist() == [position != 3 for position in range(LAYOUT.size)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("wire", [BY_TENSOR, BY_CHANNEL], ids=named)
@pytest.mark.parametrize("name", [WIDE, TALL, "head.weight", "head.bias"])
def test_int8_makes_its_tensor_or_channel_not_finite(value, wire, name):
    values = values_of(LAYOUT)
    view = LAYOUT.views(values)[name]
    view.view(-1)[-1] = value
    decoded = LAYOUT.views(through(values, LAYOUT, wire))
    spoilt = torch.ones_like(view, dtype=torch.bool)
    if wire.scale == "channel" and view.dim() == 2:
        spoilt = torch.zeros_like(spoilt)
        spoilt[(-1, slice(None)) if len(view) <= len(view.T) else (slice(None), -1)] = True
    assert torch.equal(~torch.isfinite(decoded[name]), spoilt)
    assert all(torch.isfinite(other).all() for key, other in decoded.items() if key != name)


@given(layouts, wires)
def test_bytes_are_counted_as_they_travel(layout, wire):
    record = encode(values_of(layout), layout, wire)
    assert num_bytes(layout, wire) == sum(payload(array) for array in record.values())


def test_only_float32_is_not_lossy():
    assert [wire.lossy for wire in (EXACT, HALF, BY_TENSOR, BY_CHANNEL)] == [False, True, True, True]


@pytest.mark.parametrize("sent", WIRES, ids=named)
@pytest.mark.parametrize("expected", WIRES, ids=named)
def test_another_format_than_expected_is_refused(sent, expected):
    record = encode(values_of(LAYOUT), LAYOUT, sent)
    if sent.dtype == expected.dtype and (sent.dtype != "int8" or sent == expected):
        assert decode(record, LAYOUT, expected).shape == (LAYOUT.size,)
        return
    with pytest.raises(MessageError):
        decode(record, LAYOUT, expected)


@pytest.mark.parametrize("wire", [EXACT, HALF, BY_CHANNEL], ids=named)
@pytest.mark.parametrize(
    "names", [[], ["other"], [SCALE], [FLAT, "more"], [FLAT, SCALE, "more"], [SCALE, FLAT]], ids=str
)
def test_arrays_by_other_names_are_refused(wire, names):
    array = encode(values_of(LAYOUT), LAYOUT, wire)[FLAT]
    with pytest.raises(MessageError, match=r"Expected the array\(s\)"):
        decode(ArrayRecord(dict.fromkeys(names, array)), LAYOUT, wire)


@pytest.mark.parametrize("wire", WIRES, ids=named)
@pytest.mark.parametrize("dtype", ["float64", ">f4", ">f2", "uint8", "int16", "bool", "complex64"])
def test_another_dtype_is_refused(wire, dtype):
    record = encode(values_of(LAYOUT), LAYOUT, wire)
    for name in list(record):
        spoilt = ArrayRecord({**record, name: Array(np.zeros(record[name].shape, dtype))})
        with pytest.raises(MessageError, match="has dtype"):
            decode(spoilt, LAYOUT, wire)


@pytest.mark.parametrize("wire", WIRES, ids=named)
@pytest.mark.parametrize("change", [-1, 1])
def test_another_shape_is_refused(wire, change):
    record = encode(values_of(LAYOUT), LAYOUT, wire)
    for name, array in record.items():
        for shape in ((array.shape[0] + change,), (*array.shape, 1), ()):
            spoilt = ArrayRecord({**record, name: flat_to_array(np.zeros(shape), array.dtype)})
            with pytest.raises(MessageError, match="has shape"):
                decode(spoilt, LAYOUT, wire)


def with_data(record, name, data):
    array = record[name]
    return ArrayRecord({**record, name: Array(array.dtype, array.shape, array.stype, data)})


@given(st.sampled_from(WIRES), st.data())
def test_truncated_or_further_bytes_are_refused(wire, data):
    record = encode(values_of(LAYOUT), LAYOUT, wire)
    name = data.draw(st.sampled_from(list(record)))
    whole = record[name].data
    shorter = st.integers(0, len(whole) - 1).map(lambda length: whole[:length])
    longer = st.binary(min_size=1, max_size=9).map(lambda further: whole + further)
    with pytest.raises(MessageError):
        decode(with_data(record, name, data.draw(shorter | longer)), LAYOUT, wire)


@given(st.sampled_from(WIRES), st.data())
def test_garbage_is_read_or_refused_with_the_one_error(wire, data):
    """Whatever arrives, it is values of the right number or a MessageError."""
    record = encode(values_of(LAYOUT), LAYOUT, wire)
    name = data.draw(st.sampled_from(list(record)))
    whole = record[name].data
    places = st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4)
    spoilt = bytearray(whole)
    for place, value in data.draw(places):
        spoilt[place] = value
    garbage = (
        st.binary(max_size=300) | st.just(bytes(spoilt)) | st.binary(max_size=99).map(lambda tail: whole[:10] + tail)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy's parser, on headers that look like Python 2's
        try:
            decoded = decode(with_data(record, name, data.draw(garbage)), LAYOUT, wire)
        except MessageError:
            return
    assert decoded.shape == (LAYOUT.size,)
    assert decoded.dtype == torch.float32


@pytest.mark.parametrize("field", ["dtype", "scale"])
def test_an_unknown_format_is_refused_by_its_choices(field):
    with pytest.raises(ConfigError, match=f"wire.{field}='other' is not one of"):
        validate(WireConfig(**{field: "other"}), "wire.")
