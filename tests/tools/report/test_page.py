"""The page itself: what is on it, that it needs nothing else, that names stay text, and its size."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from tools.report.__main__ import main
from tools.report.heat_maps import MAX_VALUES
from tools.report.page import render
from tools.report.plots import BACKGROUNDS, PALETTE
from tools.report.reading import read_runs


class Elements(HTMLParser):
    """Tags with their attributes, in order."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def embedded(page, key):
    return json.loads(re.search(rf'id="{key}">(.*?)</script>', page, re.DOTALL)[1])


def titles(page):
    return re.findall(r"<h3[^>]*>(.*?)</h3>", page)


def test_every_plot_that_a_run_has_data_for_is_there(folders, tmp_path, capsys):
    out = tmp_path / "new" / "report.html"
    assert main([*map(str, folders.values()), "--out", str(out)]) == 0
    page = out.read_text()
    assert capsys.readouterr().out == f"{out} ({out.stat().st_size / 1e6:.1f} MB)\n"
    shared = {"central-by-round", "central-by-bytes", "clients-by-round", "clients-by-bytes"}
    shared |= {"client-accuracies", "mean-seconds"}
    livar = {f"run-1-{key}" for key in ("partition", "clients", "class-weights", "layer-weights", "seconds")}
    fedlama = {f"run-2-{key}" for key in ("partition", "clock", "discrepancy", "seconds")}
    pfedla = {f"run-3-{key}" for key in ("partition", "clients", "alpha", "seconds")}
    assert set(embedded(page, "figures")) == shared | livar | fedlama | pfedla
    ids = [attributes["id"] for _, attributes in Elements(page).found if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_page_refers_to_nothing_outside(folders):
    page = render(read_runs([folders["livar"]]))
    for tag, attributes in Elements(page).found:
        for key in ("src", "href"):
            assert attributes.get(key, "#").startswith(("#", "data:")), (tag, attributes)
    assert "default-src 'none'" in page


def test_a_page_of_one_run_names_it_once(folders):
    page = render(read_runs([folders["pfedla"]]))
    shown = re.sub(r"<title>.*?</title>|<pre.*?</pre>|<script.*?</script>", "", page, flags=re.DOTALL)
    assert shown.count(folders["pfedla"].name) == 1
    assert folders["pfedla"].name not in json.dumps(embedded(page, "figures"))
    assert [trace["name"] for trace in embedded(page, "figures")["client-accuracies"]["data"]] == [
        "As received",
        "After tuning",
    ]
    assert '<th scope="col">run</th>' not in page


def test_runs_that_are_compared_are_named(folders):
    runs = read_runs([folders["livar"], folders["pfedla"]])
    figures = embedded(render(runs), "figures")
    names = [run.name for run in runs]
    assert [trace["name"] for trace in figures["central-by-round"]["data"]] == names
    assert [trace["name"] for trace in figures["client-accuracies"]["data"]] == [*names, f"{names[1]}, tuned"]
    assert figures["mean-seconds"]["data"][0]["y"] == names


def test_half_rounds_are_not_marked(folders, written):
    [few] = read_runs([folders["livar"]])
    [many] = read_runs([written(*({"central": {"accuracy": 0.5}} for _ in range(40)))])
    assert embedded(render([few]), "figures")["central-by-round"]["layout"]["xaxis"]["dtick"] == 1
    assert "dtick" not in embedded(render([many, few]), "figures")["central-by-round"]["layout"]["xaxis"]


def test_weights_are_those_of_the_record(folders):
    [run] = read_runs([folders["livar"]])
    page = render([run])
    plot = embedded(page, "figures")["run-1-layer-weights"]
    assert plot["rounds"] == [1, 2, 3]
    recorded = np.array(run.reports[2].details["adapter_weights"]).T
    frame = next(frame for frame in plot["frames"] if frame["name"] == "2/0")
    z = frame["data"][0]["z"]
    shown = np.array(z) if isinstance(z, list) else decoded(z)
    np.testing.assert_allclose(shown, recorded, rtol=1e-6)
    assert plot["data"][0]["y"] == run.reports[2].details["layers"]


def decoded(z):
    import base64

    shape = [int(size) for size in str(z["shape"]).split(",")]
    return np.frombuffer(base64.b64decode(z["bdata"]), dtype=z["dtype"]).reshape(shape)


def test_configs_are_there_to_the_letter_and_compared(folders):
    runs = read_runs([folders["livar"], folders["fedlama"]])
    page = render(runs)
    for run in runs:
        assert run.yaml == (run.folder / "config.yaml").read_text()
    assert '<th scope="row">strategy.name</th><td>livar</td><td>fedavg</td>' in page
    assert '<th scope="row">schedule.interval</th><td>(not there)</td><td>1</td>' in page
    assert '<th scope="row">seed</th>' not in page


HOSTILE = '</script><img src=x onerror="alert(1)">'


def test_names_that_look_like_html_stay_text(written):
    report = {
        "clients_used": [HOSTILE, "b"],
        "clients_accuracy": {HOSTILE: 0.5, "b": 1.0},
        "clients_accuracy_mean": 0.7,
    }
    report["details"] = {"head_weights": [[0.5], [0.5]], "layers": [HOSTILE]}
    page = render(read_runs([written(report, report)]))
    assert HOSTILE not in page
    assert not [1 for tag, _ in Elements(page).found if tag == "img"]
    shown = embedded(page, "figures")["client-accuracies"]["data"][0]["x"]
    assert shown[0] == '&lt;/script&gt;&lt;img src=x onerror="alert(1)"&gt;'


def large(rng, clients=60, classes=100, rounds=200):
    """A record of LIVAR over many clients and classes."""
    names = [str(number) for number in range(clients)]
    for number in range(rounds + 1):
        yield {
            "server_round": number,
            "central": {"accuracy": float(rng.random())},
            "clients_used": names,
            "clients_accuracy": dict(zip(names, rng.random(clients).tolist(), strict=True)),
            "clients_accuracy_mean": 0.5,
            "details": {
                "head_weights": rng.random((clients, classes)).round(6).tolist(),
                "adapter_weights": rng.random((clients, 48)).round(6).tolist(),
            },
            "seconds": {"train": 1.0, "wait": 0.25, "total": 2.0},
        }


@pytest.mark.slow
def test_a_large_run_has_a_page_of_a_sane_size(written):
    [run] = read_runs([written(*large(np.random.default_rng(0)))])
    page = render([run])
    plots = embedded(page, "figures")
    rounds = plots["run-1-class-weights"]["rounds"]
    assert len(rounds) == MAX_VALUES // 6000
    assert (rounds[0], rounds[-1]) == (0, 200)
    assert f"The slider has {len(rounds)} of 201 rounds" in page
    assert len(page) < 11e6


def test_colours_stand_out_from_both_backgrounds():
    def luminance(colour):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    for background in BACKGROUNDS.values():
        for colour in PALETTE:
            dark, bright = sorted([luminance(colour), luminance(background)])
            assert (bright + 0.05) / (dark + 0.05) >= 3, (colour, background)
