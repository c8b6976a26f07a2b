"""Between Flower's array records and the flat tensor a strategy computes with."""

from collections.abc import Sequence

import torch
from flwr.app import Array, ArrayRecord

from task.arrays import FLAT, array_values, flat_to_array, tensor_view
from task.errors import MessageError
from task.units import Layout, make_layout
from task.wire import EXACT, WireConfig, decode, encode


class Codec:
    """Encode and decode a model as one flat array (this app) or as named arrays (any Flower app).

    Parameters
    ----------
    example : ArrayRecord
        The initial arrays; later records must have the same keys, shapes and dtypes.
    layout : Layout, optional
        Index of the flat array; without it every array of ``example`` is laid out by its name.
    wire : WireConfig
        How a packed model travels; named arrays travel as they are.

    Raises
    ------
    MessageError
        If an array is not float32, or the flat array does not fit the layout.
    """

    def __init__(self, example: ArrayRecord, layout: Layout | None = None, wire: WireConfig = EXACT) -> None:
        self.packed = list(example) == [FLAT]
        self.wire = wire if self.packed else EXACT
        if layout is None:
            layout = make_layout({name: array.shape for name, array in example.items()})
        self.layout = layout
        self._names = list(example)
        self.initial = decode(example, layout, EXACT) if self.packed else self.decode(example)

    def to_send(self, flat: torch.Tensor, units: Sequence[str] | None) -> ArrayRecord:
        """Write some of the units (None: all) of a flat tensor [layout.size] of a packed model as they travel."""
        return encode(self.layout.take(flat, units), self.layout.part(units), self.wire)

    def encode(self, flat: torch.Tensor) -> ArrayRecord:
        """Write a flat tensor [layout.size] as a record, its arrays in the order of the initial ones, unrounded."""
        if self.packed:
            return ArrayRecord({FLAT: flat_to_array(flat.numpy())})
        views = self.layout.views(flat)
        return ArrayRecord({name: Array(views[name].numpy()) for name in self._names})

    def decode(self, record: ArrayRecord, units: Sequence[str] | None = None) -> torch.Tensor:
        """Read a record that came as a flat float32 tensor [layout.size]; unrounded, a view of the bytes received.

        Of a packed one ``units`` says which of the units it holds; None stands for all.

        Raises
        ------
        MessageError
            If keys, shapes, dtypes or byte counts are not those of the layout.
        """
        if self.packed:
            return decode(record, self.layout.part(units), self.wire)
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
