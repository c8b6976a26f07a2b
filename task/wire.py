"""How values travel: as they are, as halves, or as bytes with scales; decoded before any arithmetic."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from task.arrays import FLAT, array_values, flat_to_array, tensor_view
from task.config import bounded
from task.errors import MessageError
from task.units import Layout, TensorSpec

SCALE = "scale"
LARGEST = 127


@dataclass(unsafe_hash=True)
class WireConfig:
    """How adapter and head travel."""

    dtype: str = bounded("float32", choices=("float32", "float16", "int8"))
    """Numbers on the wire, both ways. The two short ones carry a client's change instead of its values on the way
    up, with the rounding error of its earlier rounds added."""
    scale: str = bounded("channel", choices=("tensor", "channel"))
    """Of int8: one scale for a tensor, or one for each row or column of a matrix, whichever are fewer."""

    @property
    def lossy(self) -> bool:
        """Whether values are rounded on the way."""
        return self.dtype != "float32"


EXACT = WireConfig()


def encode(values: Tensor, layout: Layout, wire: WireConfig) -> ArrayRecord:
    """Write values as a record of one array ``flat``, and of a second, ``scale``, for int8.

    Parameters
    ----------
    values : Tensor, float32, [layout.size]
        The values.
    layout : Layout
        Their index.
    wire : WireConfig
        How they travel.

    Returns
    -------
    ArrayRecord
        Values that float16 or int8 cannot hold, NaN and infinity among them, arrive as values that are not finite.
    """
    if wire.dtype == "float32":
        return ArrayRecord({FLAT: flat_to_array(values.numpy())})
    if wire.dtype == "float16":
        return ArrayRecord({FLAT: flat_to_array(values.half().numpy(), "float16")})
    scale = _scales(values, layout, wire)
    steps = torch.empty(layout.size, dtype=torch.int8)
    for spec, part, of_part in _parts(layout, scale, wire):
        found = values[part].view(spec.shape) / of_part
        steps[part] = found.nan_to_num(0.0, 0.0, 0.0).round_().clamp_(-LARGEST, LARGEST).to(torch.int8).flatten()
    return ArrayRecord({FLAT: flat_to_array(steps.numpy(), "int8"), SCALE: flat_to_array(scale.numpy())})


def decode(record: ArrayRecord, layout: Layout, wire: WireConfig) -> Tensor:
    """Read what :func:`encode` wrote, sizes being checked before anything is allocated.

    Returns
    -------
    Tensor, float32, [layout.size]
        Of float32 a view of the received bytes, which are read-only.

    Raises
    ------
    MessageError
        If names, dtypes, shapes or numbers of bytes are others.
    """
    expected = [FLAT, SCALE] if wire.dtype == "int8" else [FLAT]
    if list(record) != expected:
        raise MessageError(f"Expected the array(s) {expected}, got {len(record)}: {list(record)[:3]}.")
    values = tensor_view(array_values(record[FLAT], (layout.size,), wire.dtype))
    if wire.dtype == "float32":
        return values
    if wire.dtype == "float16":
        return values.float()
    scale = tensor_view(array_values(record[SCALE], (num_scales(layout, wire),)))
    flat = torch.empty(layout.size)
    for spec, part, of_part in _parts(layout, scale, wire):
        flat[part] = (values[part].view(spec.shape) * of_part).flatten()
    return flat


def num_bytes(layout: Layout, wire: WireConfig) -> int:
    """Count the bytes of encoded values and scales, without the arrays' headers."""
    if wire.dtype == "int8":
        return layout.size + 4 * num_scales(layout, wire)
    return (2 if wire.dtype == "float16" else 4) * layout.size


def num_scales(layout: Layout, wire: WireConfig) -> int:
    """Count the scales of int8."""
    return sum(_count(spec, wire) for spec in layout.tensors)


def _scales(values: Tensor, layout: Layout, wire: WireConfig) -> Tensor:
    """Largest absolute value of every tensor or channel by 127; NaN where one is not finite."""
    found = []
    for spec in layout.tensors:
        part = values[spec.offset : spec.offset + spec.size].view(spec.shape).abs()
        across = _across(spec, wire)
        largest = part.amax().view(1) if across is None else part.amax(across)
        found.append(torch.where(torch.isfinite(largest), largest, torch.nan))
    return torch.cat([torch.empty(0), *found]) / LARGEST


def _parts(layout: Layout, scale: Tensor, wire: WireConfig) -> Iterator[tuple[TensorSpec, slice, Tensor]]:
    """Walk over the tensors with their ranges and scales, the latter so that they broadcast."""
    offset = 0
    for spec in layout.tensors:
        count, across = _count(spec, wire), _across(spec, wire)
        of_part = scale[offset : offset + count]
        yield (
            spec,
            slice(spec.offset, spec.offset + spec.size),
            of_part if across is None else of_part.unsqueeze(across),
        )
        offset += count


def _across(spec: TensorSpec, wire: WireConfig) -> int | None:
    """Dimension that shares a scale, the longer one of a matrix; None where the whole tensor does."""
    if wire.scale == "tensor" or len(spec.shape) != 2:
        return None
    return 1 if spec.shape[0] <= spec.shape[1] else 0


def _count(spec: TensorSpec, wire: WireConfig) -> int:
    across = _across(spec, wire)
    return 1 if across is None else spec.shape[1 - across]
