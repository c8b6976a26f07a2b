"""Tables in Markdown."""

from collections.abc import Sequence
from statistics import mean, stdev

NOTHING = "-"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float], sign: str = "") -> str:
    """Write mean ± sample standard deviation (n); of one value no deviation, of none a dash."""
    if not values:
        return NOTHING
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.1f}{deviation} ({len(values)})"
