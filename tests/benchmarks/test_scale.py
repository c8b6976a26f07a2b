"""The benchmark of what one server holds runs; what it measures is no matter of a test."""

from benchmarks.scale import adapter_layout, aggregation, pfedla_step


def test_a_vits_adapter_has_13_units_and_its_parameters():
    layout = adapter_layout("vit_b", 16)
    assert len(layout.units) == 13
    assert layout.size == 12 * 16 * (4 * 768 + 2 * 768 + 2 * 5 * 768) + 769 * 100


def test_small_cases_are_measured():
    step = pfedla_step("vit_ti", 2, 4, 2)
    assert step["store_gb"] == 4e-9 * adapter_layout("vit_ti", 2).size * 4
    assert step["merge_seconds"] > 0
    assert aggregation("vit_ti", 2, 3)["by_reading_once"] > 0
