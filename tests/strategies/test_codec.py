import io
import zipfile

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from strategies.codec import Codec
from task.arrays import FLAT, flat_to_array
from task.errors import MessageError

NAMED = {"head.weight": (2, 3), "blocks.0.w": (4,), "norm": (2,), "blocks.0.b": (1,)}


def named(values=1.0):
    return ArrayRecord({name: Array(np.full(shape, values, np.float32)) for name, shape in NAMED.items()})


def test_named_arrays_come_back_in_their_order_with_their_values():
    codec = Codec(named())
    flat = torch.arange(codec.layout.size, dtype=torch.float32)
    record = codec.encode(flat)
    assert list(record) == list(NAMED)
    assert torch.equal(codec.decode(record), flat)


def test_a_flat_array_is_viewed_not_copied():
    record = ArrayRecord({FLAT: flat_to_array(np.arange(5, dtype=np.float32))})
    flat = Codec(record).decode(record)
    received = np.frombuffer(record[FLAT].data, dtype=np.float32, offset=len(record[FLAT].data) - 20)
    assert flat.data_ptr() == received.ctypes.data


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.npy", b"")
    return buffer.getvalue()


def huge_header():
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**13,)})
    return header.getvalue()


@pytest.mark.parametrize(
    "array",
    [
        Array("float32", (4,), "numpy.ndarray", b"garbage"),
        Array("float32", (4,), "numpy.ndarray", zipped()),
        Array("float32", (4,), "another.kind", b""),
        Array("float32", (4,), "numpy.ndarray", huge_header()),
        Array(np.zeros(4, np.float64)),
        Array(np.zeros(5, np.float32)),
        Array(np.asfortranarray(np.zeros((2, 2), np.float32))),
    ],
)
def test_a_named_array_that_is_not_what_it_should_be_is_refused(array):
    codec, record = Codec(named()), named()
    record["blocks.0.w"] = array
    with pytest.raises(MessageError, match="'blocks.0.w'"):
        codec.decode(record)


def test_missing_and_unexpected_keys_are_named():
    codec, record = Codec(named()), named()
    record["other"] = record.pop("norm")
    with pytest.raises(MessageError, match=r"missing \['norm'\], unexpected \['other'\]"):
        codec.decode(record)
