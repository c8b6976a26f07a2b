"""Layer units: how the trainable tensors lie in one flat array, and which of them belong together.

Client and server derive the same :class:`Layout` from the same model; its digest travels with every
message. Strategies, byte counts and reports speak of units, never of single tensors.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

import torch

from task.errors import ModelError

HEAD = "head"
Granularity = Literal["block", "module"]
_BLOCK = re.compile(r"^(?:.*\.)?blocks\.\d+(?=\.)")
_LORA_SUFFIX = re.compile(r"\.lora_(A|B)\.weight$")


@dataclass(frozen=True)
class TensorSpec:
    """Where one trainable tensor lies in the flat array."""

    unit: str
    """Name of the layer unit the tensor belongs to."""
    name: str
    """Name under timm's module path, e.g. ``blocks.0.attn.qkv.lora_A.weight``."""
    shape: tuple[int, ...]
    """Shape of the tensor."""
    offset: int
    """Index of its first element in the flat array."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """An ordered index of tensors over one flat float32 array, every unit contiguous."""

    tensors: tuple[TensorSpec, ...]
    """All tensors by ascending offset, without gaps."""

    @property
    def size(self) -> int:
        """Number of elements of the flat array."""
        return sum(spec.size for spec in self.tensors)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """The contiguous range of each unit, in order of the flat array."""
        ranges: dict[str, slice] = {}
        for spec in self.tensors:
            start = ranges[spec.unit].start if spec.unit in ranges else spec.offset
            ranges[spec.unit] = slice(start, spec.offset + spec.size)
        return ranges

    @property
    def units(self) -> tuple[str, ...]:
        """Names of the units, in order of the flat array."""
        return tuple(self.slices)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the index (unit, name, shape, dtype, offset), hexadecimal."""
        rows = [[spec.unit, spec.name, list(spec.shape), "float32", spec.offset] for spec in self.tensors]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """View the flat array as named tensors, without copying."""
        return {spec.name: flat[spec.offset : spec.offset + spec.size].view(spec.shape) for spec in self.tensors}

    def part(self, units: Sequence[str] | None) -> "Layout":
        """Lay some of the units out by themselves, in the order they have here; None stands for all."""
        if units is None:
            return self
        specs, offset = [], 0
        for spec in self.tensors:
            if spec.unit in units:
                specs.append(replace(spec, offset=offset))
                offset += spec.size
        return Layout(tuple(specs))

    def take(self, flat: torch.Tensor, units: Sequence[str] | None) -> torch.Tensor:
        """Copy some of the units out, one after another; all of them (None) are the array itself, not a copy."""
        if units is None:
            return flat
        return torch.cat([flat[:0], *(flat[part] for unit, part in self.slices.items() if unit in units)])

    def put(self, flat: torch.Tensor, units: Sequence[str] | None, values: torch.Tensor) -> None:
        """Overwrite some of the units by values that :meth:`take` gave."""
        offset = 0
        for unit, part in self.slices.items():
            if units is None or unit in units:
                size = part.stop - part.start
                flat[part].copy_(values[offset : offset + size])
                offset += size

    def unit_views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """View the flat array as one 1-D tensor per unit, without copying."""
        return {unit: flat[part] for unit, part in self.slices.items()}


def unit_of(name: str, granularity: Granularity, head: str = HEAD) -> str:
    """Name the unit of a trainable tensor.

    Parameters
    ----------
    name : str
        Tensor name under timm's module path.
    granularity : {"block", "module"}
        One unit per transformer block, or one per adapted module.
    head : str
        Module path of the classification head.

    Returns
    -------
    str
        ``head``, a block such as ``blocks.3``, or a module such as ``blocks.3.attn.qkv``; a tensor outside
        every block belongs to its module.
    """
    if name.startswith(f"{head}."):
        return HEAD
    block = _BLOCK.match(name)
    if granularity == "block" and block:
        return block.group()
    return _LORA_SUFFIX.sub("", name) if _LORA_SUFFIX.search(name) else name.rpartition(".")[0] or name


def make_layout(shapes: Mapping[str, Iterable[int]], granularity: Granularity = "block", head: str = HEAD) -> Layout:
    """Lay tensors out one after another, unit by unit, the head last.

    Parameters
    ----------
    shapes : Mapping[str, Iterable[int]]
        Tensor names and shapes in model order.
    granularity : {"block", "module"}
        See :func:`unit_of`.
    head : str
        Module path of the classification head.

    Returns
    -------
    Layout
        Units in order of first appearance, the head last; tensors in model order within a unit.
    """
    by_unit: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        by_unit.setdefault(unit_of(name, granularity, head), []).append((name, tuple(shape)))
    if HEAD in by_unit:
        by_unit[HEAD] = by_unit.pop(HEAD)
    specs, offset = [], 0
    for unit, members in by_unit.items():
        for name, shape in members:
            specs.append(TensorSpec(unit, name, shape, offset))
            offset += math.prod(shape)
    return Layout(tuple(specs))


@dataclass(frozen=True)
class LoraLayer:
    """One adapted linear layer: where its two factors lie in the flat array."""

    name: str
    """Module path, e.g. ``blocks.0.attn.qkv``."""
    a: TensorSpec | None
    """A [r, in]; None where it is frozen and not exchanged."""
    b: TensorSpec
    """B [out, r]."""

    @property
    def inputs(self) -> int:
        """Width of what the first exchanged factor takes in: the layer's inputs, or A's outputs where A is frozen."""
        return self.b.shape[1] if self.a is None else self.a.shape[1]

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The exchanged factors."""
        return (self.b,) if self.a is None else (self.a, self.b)


@lru_cache(maxsize=16)
def lora_layers(layout: Layout) -> tuple[LoraLayer, ...]:
    """List the adapted layers of a layout, in its order."""
    found: dict[str, dict[str, TensorSpec]] = {}
    for spec in layout.tensors:
        match = _LORA_SUFFIX.search(spec.name)
        if match:
            found.setdefault(spec.name[: match.start()], {})[match.group(1)] = spec
    return tuple(LoraLayer(name, pair.get("A"), pair["B"]) for name, pair in found.items() if "B" in pair)


@lru_cache(maxsize=16)
def head_specs(layout: Layout) -> tuple[TensorSpec, TensorSpec | None]:
    """Find weight [classes, d] and bias [classes] of the head.

    Raises
    ------
    ModelError
        If the layout has no unit ``head`` with a matrix.
    """
    specs = [spec for spec in layout.tensors if spec.unit == HEAD]
    matrices, vectors = [s for s in specs if len(s.shape) == 2], [s for s in specs if len(s.shape) == 1]
    if len(matrices) != 1:
        raise ModelError(f"The model has no linear head to merge by class; its units are: {', '.join(layout.units)}.")
    return matrices[0], vectors[0] if vectors else None


def head_shape(layout: Layout) -> tuple[int, int]:
    """Return the numbers of classes and of feature dimensions."""
    classes, dimension = head_specs(layout)[0].shape
    return classes, dimension
