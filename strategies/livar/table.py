"""The table that turns a layer's update scores into a raw merge weight; data, not code."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from omegaconf import OmegaConf
from yaml import YAMLError

from task.config import first_line, typed
from task.errors import ConfigError

TABLE_FOLDER = Path(__file__).resolve().parents[2] / "conf" / "livar_table"


@dataclass
class MergeTable:
    """Raw merge weights by the bins of a layer's scores of A and B."""

    quantiles_a: list[float] = field(default_factory=list)
    """Ascending quantiles in (0, 1) that bound the columns."""
    quantiles_b: list[float] = field(default_factory=list)
    """Ascending quantiles in (0, 1) that bound the rows."""
    weights: list[list[float]] = field(default_factory=list)
    """Raw weights, positive, [rows by score of B, columns by score of A]."""

    @cached_property
    def tensor(self) -> torch.Tensor:
        """The raw weights, float64 [rows, columns]."""
        return torch.tensor(self.weights, dtype=torch.float64)

    def check(self, where: str) -> None:
        """Raise ConfigError if quantiles do not ascend in (0, 1), or weights do not fit them or are not positive."""
        for name, quantiles in (("quantiles_a", self.quantiles_a), ("quantiles_b", self.quantiles_b)):
            if sorted(set(quantiles)) != quantiles or not all(0.0 < q < 1.0 for q in quantiles):
                raise ConfigError(f"{where}: {name}={quantiles} must ascend within (0, 1).")
        rows, columns = len(self.quantiles_b) + 1, len(self.quantiles_a) + 1
        if [len(row) for row in self.weights] != [columns] * rows:
            raise ConfigError(f"{where}: weights must have {rows} rows of {columns}, one more than the quantiles.")
        if not all(weight > 0 and math.isfinite(weight) for row in self.weights for weight in row):
            raise ConfigError(f"{where}: all weights must be positive and finite.")


def names_file(name: str) -> bool:
    """Tell whether a table is named by the path of a YAML file, and not as one of ``conf/livar_table/``."""
    return name.endswith((".yaml", ".yml"))


def check_name(name: str) -> None:
    """Refuse a name that is none of ``conf/livar_table/`` by a ConfigError; only the server looks for other files."""
    if not names_file(name):
        _table_path(name)


def read_table(name: str) -> MergeTable:
    """Read a table: ``published``, another file of ``conf/livar_table/``, or the path of a YAML file on the server.

    Raises
    ------
    ConfigError
        If there is no such file, or it is not a table.
    """
    path = _table_path(name)
    try:
        loaded = OmegaConf.load(path)
    except (OSError, ValueError, YAMLError) as error:
        raise ConfigError(f"strategy.table={name!r} cannot be read: {first_line(error)}.") from error
    table = typed(MergeTable, loaded)
    table.check(f"strategy.table={name!r}")
    return table


def _table_path(name: str) -> Path:
    """Find the file of a table, or raise a ConfigError."""
    path = Path(name) if names_file(name) else TABLE_FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in TABLE_FOLDER.glob("*.yaml")))
        raise ConfigError(f"strategy.table={name!r} is neither one of {known} nor a YAML file that is there.")
    return path


PUBLISHED_TABLE = read_table("published")
"""The table of the paper."""
