"""The benchmark of what one server holds runs; what it measures is no matter of a test."""

from benchmarks.scale import (
    CASES,
    ROWS,
    adapter_layout,
    aggregation,
    pfedla_step,
    svd_merge,
    table,
)


def test_a_vits_adapter_has_13_units_and_its_parameters():
    layout = adapter_layout("vit_b", 16)
    assert len(layout.units) == 13
    assert layout.size == 12 * 16 * (4 * 768 + 2 * 768 + 2 * 5 * 768) + 769 * 100


def small():
    step = pfedla_step("vit_ti", 2, 4, 2)
    merges = svd_merge("vit_ti", 2, 2)
    measured = {"pfedla": step, "aggregation": aggregation("vit_ti", 2, 3), "svd": merges}
    return {name: measured[name.partition("_")[0]] for name in CASES}


def test_small_cases_are_measured_and_fill_every_line_of_the_table():
    found = small()
    step, merged = found["pfedla_vit_b_r16_100_of_100"], found["aggregation_100_vit_b_r16"]
    assert step["store_gb"] == 4e-9 * adapter_layout("vit_ti", 2).size * 4
    assert step["merge_seconds"] > 0
    assert 0.25 < step["largest_weight"] < 0.5, "steps are as small as in training: no weights run to one or NaN"
    assert merged["by_reading_once"] > 0
    assert merged["copying_gb_per_second"] > 0
    lines = table(found).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert all(line.count("|") == 4 and "{" not in line for line in lines)
    assert len(table({"svd_merge_10_vit_b_r16": {"seconds": 1.0}}).splitlines()) == 3


def test_the_table_says_which_aims_are_met():
    figures = {key: 1.0 for row in ROWS for key in (row.key, "store_gb")} | {"merge_seconds": 2.01}
    lines = table({"pfedla_vit_b_r16_100_of_100": {**figures, "extra_memory_by_store": 0.25}}).splitlines()
    assert lines[2].endswith("| 2.01 s | 2 s: missed |")
    assert lines[3].endswith("store (1.00 GB) | 0.25 | 0.25: met |")
    assert lines[4].endswith("| 1.00 s |  |")
