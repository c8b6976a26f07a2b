"""The table from SHAP offsets: by hand, and as the strategy reads it."""

import numpy as np
import pytest
import yaml

from strategies.livar import PUBLISHED_TABLE, MergeTable, read_table
from strategies.livar.table import TABLE_FOLDER
from task.errors import ConfigError
from tools.explain.table import FLOOR, derive_table, write_table

BINS = np.array([[row, column] for row in range(3) for column in range(3)] + [[2, 0]])


def test_weights_are_base_plus_mean_offset_by_hand():
    """Bin (2, 0) has two rows: 1 + mean(.06 + .06, .20 + .40) = 1.36; of the others row i gets 1 + i/100 + i/100."""
    offset = np.append(np.arange(9) / 100, 0.20)
    derived = derive_table(1.0, offset, np.append(np.arange(9) / 100, 0.40), BINS)
    assert derived.table.weights == [[1.0, 1.02, 1.04], [1.06, 1.08, 1.1], [1.36, 1.14, 1.16]]
    assert derived.counts.tolist() == [[1, 1, 1], [1, 1, 1], [2, 1, 1]]
    assert derived.floored == 0
    assert (derived.table.quantiles_a, derived.table.quantiles_b) == ([0.25, 0.5], [0.6, 0.8])


def test_weights_below_the_floor_are_raised_and_counted():
    offset = np.where(BINS[:, 0] == 0, -0.6, 0.1)
    derived = derive_table(1.0, offset, offset, BINS)
    assert derived.table.weights == [[FLOOR] * 3, [1.2] * 3, [1.2] * 3]
    assert derived.floored == 3


def test_a_bin_without_rows_gets_the_offsets_of_its_column_and_row():
    kept = ~((BINS[:, 0] == 2) & (BINS[:, 1] == 0))
    bins = BINS[kept]
    derived = derive_table(1.0, bins[:, 1] / 10, bins[:, 0] / 10, bins)
    assert derived.counts[2, 0] == 0
    assert derived.table.weights[2][0] == pytest.approx(1.0 + 0.0 + 0.2)


def test_the_strategy_reads_what_is_written(tmp_path):
    derived = derive_table(1.0, np.append(np.arange(9) / 100, 0.20), np.zeros(10), BINS)
    write_table(tmp_path / "table.yaml", derived.table, "5 records")
    text = (tmp_path / "table.yaml").read_text()
    assert text.startswith("# A merge table derived by tools/explain from 5 records.\n")
    assert read_table(str(tmp_path / "table.yaml")) == derived.table
    published = yaml.safe_load((TABLE_FOLDER / "published.yaml").read_text())
    assert list(yaml.safe_load(text)) == list(published)


def test_a_table_that_is_none_is_refused(tmp_path):
    weights = [[1.0] * 3, [1.0] * 3, [1.0, 1.0, 0.0]]
    broken = MergeTable(PUBLISHED_TABLE.quantiles_a, PUBLISHED_TABLE.quantiles_b, weights)
    with pytest.raises(ConfigError, match="positive"):
        write_table(tmp_path / "table.yaml", broken, "nothing")
