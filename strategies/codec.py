"""Between Flower's array records and the flat tensor a strategy computes with."""

import warnings

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from task.errors import MessageError
from task.messages import FLAT, array_to_flat, array_values, flat_to_array
from task.units import Layout, make_layout


class Codec:
    """Encode and decode a model as one flat array (this app) or as named arrays (any Flower app).

    Parameters
    ----------
    example : ArrayRecord
        The initial arrays; later records must have the same keys, shapes and dtypes.
    layout : Layout, optional
        Index of the flat array; without it every array of ``example`` is laid out by its name.

    Raises
    ------
    MessageError
        If an array is not float32, or the flat array does not fit the layout.
    """

    def __init__(self, example: ArrayRecord, layout: Layout | None = None) -> None:
        self.packed = list(example) == [FLAT]
        if layout is None:
            layout = make_layout({name: array.shape for name, array in example.items()})
        self.layout = layout
        self._names = list(example)
        self.decode(example)

    def encode(self, flat: torch.Tensor) -> ArrayRecord:
        """Write a flat tensor [layout.size] as a record, its arrays in the order of the initial ones."""
        if self.packed:
            return ArrayRecord({FLAT: flat_to_array(flat.numpy())})
        views = self.layout.views(flat)
        return ArrayRecord({name: Array(views[name].numpy()) for name in self._names})

    def decode(self, record: ArrayRecord) -> torch.Tensor:
        """Read a record as a flat float32 tensor [layout.size]; a view of the received bytes where it is packed.

        Raises
        ------
        MessageError
            If keys, shapes, dtypes or byte counts are not those of the layout.
        """
        if self.packed:
            if list(record) != [FLAT]:
                raise MessageError(f"Expected one array named {FLAT!r}, got {len(record)}: {list(record)[:3]}.")
            return tensor_view(array_to_flat(record[FLAT], self.layout.size))
        return self._decode_named(record)

    def _decode_named(self, record: ArrayRecord) -> torch.Tensor:
        if set(record) != set(self._names):
            missing, extra = sorted(set(self._names) - set(record)), sorted(set(record) - set(self._names))
            raise MessageError(f"Array keys differ: missing {missing[:3]}, unexpected {extra[:3]}.")
        flat = torch.empty(self.layout.size, dtype=torch.float32)
        for name, view in self.layout.views(flat).items():
            try:
                view.copy_(tensor_view(array_values(record[name], tuple(view.shape))))
            except MessageError as error:
                raise MessageError(f"{name!r}: {error}") from error
        return flat


def tensor_view(values: np.ndarray) -> torch.Tensor:
    """View NumPy values as a tensor; received bytes are read-only and are only read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(values)
