"""Real rounds with differential privacy: every combination that is allowed, and those that are refused."""

import pytest
import torch
from safetensors.torch import load_file

from client_app.app import app as client_app
from server_app.compose import compose_run
from task.errors import ConfigError
from tests.server_app.test_app import DIGITS, reports, run
from tools.debug import InProcessGrid, simulated_nodes

KINDS = ["central_fixed", "central_adaptive", "local", "secagg"]
STRATEGIES = ["fedavg", "fedprox", "ffa_lora"]


def values(folder):
    files = [folder / "adapter" / name for name in ("adapter_model.safetensors", "head.safetensors")]
    return torch.cat([tensor.flatten() for file in files for _, tensor in sorted(load_file(file).items())])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_real_run_with_every_allowed_combination(tmp_path, strategy, kind):
    folder = run(tmp_path, [*DIGITS, f"strategy={strategy}", f"privacy={kind}", "num_server_rounds=2"])
    rounds = reports(folder)[1:]
    assert all(report["merged"] for report in rounds)
    assert [report["clients_used"] for report in rounds] == [["0", "1", "2"]] * 2
    assert not any(report["clients_dropped"] for report in rounds)


def test_without_noise_and_with_room_the_outcome_is_the_plain_mean(tmp_path):
    """Three clients with as many images each; the clipped values differ by float rounding alone."""
    common = [*DIGITS, "num_server_rounds=1"]
    plain = values(run(tmp_path / "plain", common))
    options = ["privacy.clipping_norm=1000", "privacy.noise_multiplier=0"]
    private = values(run(tmp_path / "private", [*common, "privacy=central_fixed", *options]))
    torch.testing.assert_close(private, plain, rtol=1e-3, atol=2e-3)


def test_the_change_of_a_round_is_within_the_norm(tmp_path):
    options = ["privacy=central_fixed", "privacy.clipping_norm=0.01", "privacy.noise_multiplier=0"]
    one = values(run(tmp_path / "one", [*DIGITS, "num_server_rounds=1", *options]))
    two = values(run(tmp_path / "two", [*DIGITS, "num_server_rounds=2", *options]))
    assert 0.001 < float((two - one).norm()) <= 0.0101


def test_local_noise_is_in_every_clients_update(tmp_path):
    options = ["privacy=local", "privacy.clipping_norm=0.5", "privacy.epsilon=0.5", "num_server_rounds=1"]
    folders = [run(tmp_path / str(i), [*DIGITS, *options]) for i in range(2)]
    one, two = (values(folder) for folder in folders)
    single = 2 * 0.5 * (2 * torch.log(torch.tensor(1.25 / 1e-5))).sqrt() / 0.5
    expected = float(single / 3**0.5 * 2**0.5)
    assert float((one - two).std()) == pytest.approx(expected, rel=0.1)


def test_one_client_that_fails_does_not_end_a_private_round(tmp_path):
    class Failing(InProcessGrid):
        def _deliver(self, message):
            if message.metadata.dst_node_id == 1 and message.metadata.message_type == "train":
                del message.content.array_records["arrays"]
            return super()._deliver(message)

    folder = run(tmp_path, [*DIGITS, "privacy=central_fixed"], Failing(client_app, simulated_nodes(3)))
    last = reports(folder)[-1]
    assert last["merged"]
    assert last["clients_used"] == ["1", "2"]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["strategy=livar"], r"privacy=local does not go with strategy=livar, .* weights or signals of its own"),
        (["strategy=pfedla"], "does not go with strategy=pfedla"),
        (["strategy=regmean"], "It goes with: fedavg, fedprox, ffa_lora"),
        (["schedule=fedlama"], "does not go with schedule=fedlama"),
        (["wire.dtype=int8"], r"does not go with wire\.dtype=int8"),
        (["calibration=ccvr"], "does not go with calibration=ccvr"),
        (["lora.merge=product_svd"], r"does not go with lora\.merge=product_svd"),
        (["record_updates=true"], "does not go with record_updates=true"),
    ],
)
def test_what_clipping_and_noise_would_not_cover_is_refused(overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        compose_run({}, ["privacy=local", *overrides])


def test_under_secure_aggregation_weights_of_single_clients_are_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"privacy=secagg .* signals of its own, of which the server sees none"):
        compose_run({}, ["privacy=secagg", "strategy=livar"])
