"""Arrays of values in Flower's records: written with one copy, read without any."""

import io
import math
import warnings

import numpy as np
import torch
from flwr.app import Array

from task.errors import MessageError

FLAT = "flat"


def flat_to_array(flat: np.ndarray, dtype: str = "float32") -> Array:
    """Serialise a flat array with a single copy (NumPy's .npy format, as Flower's own)."""
    header = io.BytesIO()
    flat = np.ascontiguousarray(flat, dtype=dtype)
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(flat))
    data = b"".join((header.getvalue(), flat.data))
    return Array(dtype=dtype, shape=tuple(flat.shape), stype="numpy.ndarray", data=data)


def array_to_flat(array: Array, size: int) -> np.ndarray:
    """View a received array as flat float32 values [size]; see :func:`array_values`."""
    return array_values(array, (size,))


def array_values(array: Array, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    """View a received array as values of a dtype, without copying or allocating.

    Parameters
    ----------
    array : Array
        As received.
    shape : tuple[int, ...]
        The shape it must have.
    dtype : str
        The dtype it must have, little-endian.

    Returns
    -------
    ndarray of that shape and dtype
        A read-only view of the received bytes.

    Raises
    ------
    MessageError
        If format, dtype, shape or number of bytes are not exactly what is expected.
    """
    buffer = io.BytesIO(array.data)
    try:
        if np.lib.format.read_magic(buffer) != (1, 0):
            raise ValueError("it is not in version 1.0 of NumPy's format")
        found, fortran_order, its_dtype = np.lib.format.read_array_header_1_0(buffer)
    except Exception as error:  # NumPy's parser raises many unrelated types on broken headers
        raise MessageError(f"The array's header cannot be read: {error}") from error
    wanted = np.dtype(dtype).newbyteorder("<")
    if its_dtype != wanted or (fortran_order and len(shape) > 1):
        raise MessageError(f"The array has dtype {its_dtype}, expected {dtype} in C order.")
    if found != shape:
        raise MessageError(f"The array has shape {list(found)}, expected {list(shape)}.")
    start, size = buffer.tell(), math.prod(shape)
    expected = wanted.itemsize * size
    if len(array.data) - start != expected:
        raise MessageError(f"The array holds {len(array.data) - start} bytes, expected {expected}.")
    return np.frombuffer(array.data, dtype=wanted, offset=start).reshape(shape)


def tensor_view(values: np.ndarray) -> torch.Tensor:
    """View NumPy values as a tensor; received bytes are read-only and are only read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(values)
