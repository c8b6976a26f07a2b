"""The benchmark of the signals runs; what it measures is no matter of a test."""

import json

from benchmarks.signals import main

TINY = ["backbone=vit_pico_random", "backbone.arguments={patch_size:4,embed_dim:32,depth:2,num_heads:2}"]


def test_a_pair_is_measured_and_written_down(tmp_path, capsys):
    file = tmp_path / "bench" / "signals.json"
    main([*TINY, "backbone.image_size=16", "--images", "16", "--pairs", "2", "--json", str(file)])
    found = json.loads(file.read_text())["signals_overhead"]
    assert found["min"] <= found["median"] <= found["max"]
    assert "At most 2 % in the median: " in capsys.readouterr().out
