"""Which layer units travel in a round, and what a client keeps of the others."""

from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord

from task.config import validate
from task.errors import MessageError
from task.units import Layout
from task.wire import EXACT, WireConfig

MAX_RUN_NAME = 64


@dataclass(frozen=True)
class Exchange:
    """What a round moves of the model; by default all of it both ways, and nothing is kept."""

    down: tuple[str, ...] | None = None
    """Units that the client receives, in order of the layout; None: all."""
    up: tuple[str, ...] | None = None
    """Units that the client sends back, in order of the layout; None: all."""
    start: int = 0
    """Round after which the client kept the values that it goes on from; 0: it starts from what it receives."""
    keep: bool = False
    """Keep the values of this round, for another that starts there."""
    moments: bool = False
    """Keep the optimizer's state as well, and go on with the one that was kept."""
    run: str = ""
    """Name of the run that kept things belong to; another run never sees them."""
    wire: WireConfig = EXACT
    """How values travel. Rounded ones go up as the change since the client received them; the rounding error is kept
    and added to the next round's."""

    def to_fields(self) -> dict[str, int | str | bool | list[str]]:
        """Write what differs from the default as fields of a Flower record."""
        fields: dict[str, int | str | bool | list[str]] = {}
        if self.down is not None:
            fields["units-down"] = list(self.down)
        if self.up is not None:
            fields["units-up"] = list(self.up)
        if self.start:
            fields["start"] = self.start
        if self.keep:
            fields["keep"] = True
        if self.moments:
            fields["moments"] = True
        if self.run:
            fields["run"] = self.run
        if self.wire.lossy:
            fields |= {"wire-dtype": self.wire.dtype, "wire-scale": self.wire.scale}
        return fields

    @staticmethod
    def from_record(record: ConfigRecord) -> "Exchange":
        """Read what :meth:`to_fields` wrote.

        Raises
        ------
        MessageError
            If a field is of the wrong type, or kept things are spoken of without the name of a run.
        ConfigError
            If there is no such wire format.
        """
        start, keep, run = record.get("start", 0), record.get("keep", False), record.get("run", "")
        moments = record.get("moments", False)
        if not isinstance(start, int) or isinstance(start, bool) or start < 0:
            raise MessageError(f"The instruction has start={start!r}; it is not followed.")
        if not isinstance(keep, bool) or not isinstance(moments, bool):
            raise MessageError(f"The instruction has keep={keep!r} and moments={moments!r}; it is not followed.")
        wire = _wire(record.get("wire-dtype", EXACT.dtype), record.get("wire-scale", EXACT.scale))
        if not isinstance(run, str) or len(run) > MAX_RUN_NAME or ((start or keep or wire.lossy) and not run):
            raise MessageError("The instruction speaks of kept values without a proper name of the run.")
        return Exchange(_names(record, "units-down"), _names(record, "units-up"), start, keep, moments, run, wire)

    def check(self, layout: Layout) -> None:
        """Refuse units that the layout does not have in this order, and missing ones where nothing was kept.

        Raises
        ------
        MessageError
            Naming the unit.
        """
        for units in (self.down, self.up):
            in_order = [unit for unit in layout.units if unit in (units or ())]
            if units is not None and list(units) != in_order:
                raise MessageError(f"The units {', '.join(units)[:200]} are not those of the layout in its order.")
        if not self.start and self.down is not None and self.down != layout.units:
            raise MessageError("Some units were not sent, and the client is not told to go on from kept values.")


EVERYTHING = Exchange()


def units_or_none(units: Sequence[str], layout: Layout) -> tuple[str, ...] | None:
    """Name units of a layout in its order; None where they are all."""
    chosen = tuple(unit for unit in layout.units if unit in set(units))
    return None if chosen == layout.units else chosen


def _wire(dtype: object, scale: object) -> WireConfig:
    """Check a received wire format; nothing in it is ever resolved or interpolated."""
    if not isinstance(dtype, str) or not isinstance(scale, str):
        raise MessageError("The instruction's wire format is no text; it is not followed.")
    wire = WireConfig(dtype, scale)
    validate(wire, "wire.")
    return wire


def _names(record: ConfigRecord, key: str) -> tuple[str, ...] | None:
    value = record.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise MessageError(f"{key!r} in the message's config is not a list of names of units.")
    return tuple(name for name in value if isinstance(name, str))
