"""Tables of merge weights: the published one, a user's own, and what is none."""

import pytest
import torch

from strategies.livar import PUBLISHED_TABLE, Livar, LivarConfig, MergeTable, read_table
from task.errors import ConfigError

NAN, INF = float("nan"), float("inf")
FINE = {"quantiles_a": [0.25, 0.5], "quantiles_b": [0.6], "weights": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]}
WRITTEN = "quantiles_a: [0.5]\nquantiles_b: [0.25, 0.75]\nweights:\n  - [1.0, 2.0]\n  - [3.0, 4.0]\n  - [5.0, 6.5]\n"


def test_the_published_table_is_that_of_the_paper():
    rows = [
        [0.03813978, 0.03813978, 0.03813978],
        [0.09813978, 0.08813978, 0.07813978],
        [0.19313978, 0.11813978, 0.09313978],
    ]
    assert read_table("published") == PUBLISHED_TABLE == MergeTable([0.25, 0.5], [0.6, 0.8], rows)
    torch.testing.assert_close(PUBLISHED_TABLE.tensor, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=0)


BAD = {
    "descending": ({"quantiles_a": [0.5, 0.25]}, r"quantiles_a=\[0.5, 0.25\] must ascend"),
    "twice": ({"quantiles_a": [0.5, 0.5]}, "quantiles_a.* must ascend"),
    "zero": ({"quantiles_a": [0.0, 0.5]}, r"quantiles_a.* within \(0, 1\)"),
    "one": ({"quantiles_b": [1.0]}, r"quantiles_b.* within \(0, 1\)"),
    "percent": ({"quantiles_b": [60.0]}, r"quantiles_b.* within \(0, 1\)"),
    "nan quantile": ({"quantiles_b": [NAN]}, r"quantiles_b.* within \(0, 1\)"),
    "a row too few": ({"weights": [[1.0, 2.0, 3.0]]}, "2 rows of 3"),
    "a row too many": ({"weights": [[1.0, 2.0, 3.0]] * 3}, "2 rows of 3"),
    "ragged": ({"weights": [[1.0, 2.0, 3.0], [4.0, 5.0]]}, "2 rows of 3"),
    "turned round": ({"weights": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]}, "2 rows of 3"),
    "no rows": ({"weights": []}, "2 rows of 3"),
    "zero weight": ({"weights": [[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]]}, "positive and finite"),
    "negative weight": ({"weights": [[1.0, 2.0, -3.0], [4.0, 5.0, 6.0]]}, "positive and finite"),
    "nan weight": ({"weights": [[NAN, 2.0, 3.0], [4.0, 5.0, 6.0]]}, "positive and finite"),
    "infinite weight": ({"weights": [[INF, 2.0, 3.0], [4.0, 5.0, 6.0]]}, "positive and finite"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_table_is_refused_with_the_reason(kind):
    change, reason = BAD[kind]
    MergeTable(**FINE).check("mine")
    with pytest.raises(ConfigError, match=f"mine: .*{reason}"):
        MergeTable(**{**FINE, **change}).check("mine")


@pytest.mark.parametrize("ending", ["yaml", "yml"])
def test_a_table_of_ones_own_is_read_by_its_path(tmp_path, ending):
    path = tmp_path / f"mine.{ending}"
    path.write_text(WRITTEN)
    expected = MergeTable([0.5], [0.25, 0.75], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.5]])
    assert read_table(str(path)) == expected
    assert Livar(LivarConfig(table=str(path))).table == expected


@pytest.mark.parametrize("name", ["publisched", "", "missing.yaml", "/etc"])
def test_a_table_that_is_not_there_is_refused_with_those_there_are(name):
    with pytest.raises(ConfigError, match=f"strategy.table='{name}' is neither one of .*published"):
        read_table(name)


WRONG = {
    "wrong sizes": ("quantiles_a: [0.5]\nweights: [[1.0, 2.0], [3.0, 4.0]]\n", "1 rows of 2"),
    "empty": ("", "1 rows of 1"),
    "unknown key": (WRITTEN + "quantile: [0.5]\n", "no key 'quantile'"),
    "words": ("quantiles_a: [0.5]\nweights: [[much, little]]\n", "weights"),
    "a list": ("[0.5, 0.25]\n", "Config|config"),
    "one word": ("published\n", "no key 'published'"),
    "no YAML": ("weights: [[1.0, }\n", "mine.yaml"),
    "no text": (b"\xff\xfe\x00", "mine.yaml"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_that_holds_no_table_is_refused(tmp_path, kind):
    content, reason = WRONG[kind]
    path = tmp_path / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=reason):
        read_table(str(path))
