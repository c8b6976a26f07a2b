"""What the benchmark writes for programs and for people."""

import json

from benchmarks.speed.ratios import Ratio
from benchmarks.speed.results import MARKER, Found, Table, write

STEP = Found({"lora_step_efficiency.compute_bound": Ratio(0.97, 0.9, 1.1, 5, 0.95)}, [Table("Step", ["a"], [["1 %"]])])
SIGNALS = Found({"signals_overhead": Ratio(0.03, 0.01, 0.05, 5, 0.02, at_most=True)})

KNOWN = ("step", "signals")


def test_a_ratio_lies_under_its_key_and_cases_not_run_stay(tmp_path):
    file, document = tmp_path / "bench" / "speed.json", tmp_path / "docs" / "speed.md"
    write(file, document, "step", STEP, {"cores": "2"}, KNOWN)
    write(file, document, "signals", SIGNALS, {"cores": "4"}, KNOWN)
    found = json.loads(file.read_text())
    assert found["lora_step_efficiency"] == {"compute_bound": 0.97}
    assert found["signals_overhead"] == 0.03
    assert found["cases"]["step"]["machine"] == {"cores": "2"}
    text = document.read_text()
    assert "| `lora_step_efficiency.compute_bound` | 0.970 | 0.900 | 1.100 | 5 | at least 0.95: met |" in text
    assert "| `signals_overhead` | 0.030 | 0.010 | 0.050 | 5 | at most 0.02: missed |" in text
    assert "## Step\n\n| a |\n| --- |\n| 1 % |" in text


def test_what_people_wrote_above_the_figures_stays(tmp_path):
    document = tmp_path / "speed.md"
    document.write_text(f"# Speed\n\nWhat did not help.\n\n{MARKER}\n\nold figures\n")
    write(tmp_path / "speed.json", document, "step", STEP, {}, KNOWN)
    assert document.read_text().startswith(f"# Speed\n\nWhat did not help.\n\n{MARKER}\n\n| ratio |")
    assert "old figures" not in document.read_text()


def test_a_case_that_is_no_more_leaves_nothing(tmp_path):
    file, document = tmp_path / "speed.json", tmp_path / "speed.md"
    write(file, document, "step", STEP, {}, KNOWN)
    write(file, document, "signals", SIGNALS, {}, ["signals"])
    assert set(json.loads(file.read_text())) == {"signals_overhead", "cases"}
    assert "lora_step_efficiency" not in document.read_text()
