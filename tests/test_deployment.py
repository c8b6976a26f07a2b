"""A deployment as docs/deployment.md has it: TLS, a key per site, images of the site's own; and who is turned away."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from PIL import Image

from tests.conftest import REPOSITORY
from tools.certificates import make_certificates
from tools.commands import free_port
from tools.deployed import NODE_READY, Site
from tools.deployment import deployment

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

TINY = (
    "backbone.image_size=16 backbone.arguments.embed_dim=32 backbone.arguments.depth=2 backbone.arguments.num_heads=2 "
    "train.batch_size=8 train.max_steps=2 strategy.evaluate_clients=train dataset.classes=[dark,light]"
)
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
CODE_305 = "Exit Code: 305\nFailed to initialize the connection to the SuperLink."
RUN_SECONDS = 900.0
"""60 seconds on an idle machine."""
REFUSAL_SECONDS = 120.0
"""5 seconds on an idle machine."""


def image_folder(folder, *classes, count=12):
    """The images of one site: small ones, dark or light."""
    values = np.random.default_rng(0)
    for name in classes:
        (folder / "train" / name).mkdir(parents=True)
        for index in range(count):
            pixels = values.integers(0, 100, (20, 20, 3)) + (150 if name == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "train" / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    data = tmp_path_factory.mktemp("sites")
    return [
        Site("clinic-a", {"data": str(image_folder(data / "a", "dark", "light")), "resident": True}),
        Site("clinic-b", {"data": str(image_folder(data / "b", "light"))}),
    ]


@pytest.fixture(scope="module")
def federation(sites):
    """The second site reaches the SuperLink through a proxy that lets through what is for SuperNodes alone."""
    with deployment(sites[:1], settings=ONE_THREAD) as running:
        port = str(free_port())
        command = [sys.executable, REPOSITORY / "tests" / "fleet_proxy.py", running.link.address, port, running.keys]
        proxy = subprocess.Popen(command)
        try:
            running.add_node(sites[1], superlink=f"127.0.0.1:{port}").start()
            yield running
        finally:
            proxy.kill()
            proxy.wait()


def refused(node):
    """Start a node that is turned away and return what it says, without where it may be read about."""
    node.launch()
    assert node.exit_code(REFUSAL_SECONDS) == 1, node.output
    assert NODE_READY not in node.output
    said = re.search(f"{CODE_305}\n(.*)\nThe SuperNode could not establish", node.output, re.DOTALL)
    assert said, node.output
    return said[1]


def test_two_sites_train_in_both_rounds_on_images_of_their_own(federation, sites):
    run_id = federation.submit(
        REPOSITORY,
        [
            'backbone="vit_pico_random" dataset="image_folder" partition="whole" num-server-rounds=2',
            f'overrides="{TINY}"',
        ],
    )
    outcome = federation.finish(run_id, RUN_SECONDS)
    assert outcome.completed, f"{outcome.summary}\n{federation.nodes['clinic-a'].output}"
    assert "No central evaluation: PETALWISE_DATA is not set for the server's process." in outcome.log

    [folder] = (federation.folder / "runs").iterdir()
    reports = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [sorted(report["clients_used"]) for report in reports[1:]] == [["clinic-a", "clinic-b"]] * 2
    assert not any(report["clients_dropped"] for report in reports[1:])
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    everything = "".join(path.read_text() for path in folder.rglob("*.json*"))
    assert not any(site.config["data"] in outcome.log + everything for site in sites)


def test_sites_are_online_under_their_names(federation):
    assert federation.online() == {"clinic-a": "online", "clinic-b": "online"}


def test_a_key_that_is_not_registered_is_refused(federation):
    said = refused(federation.add_node(Site("unknown"), registered=False))
    assert said == "[code: 2004] Failed to activate SuperNode."


def test_a_superlink_of_another_authority_is_refused(federation, tmp_path):
    make_certificates(["127.0.0.1"], tmp_path)
    node = federation.add_node(Site("misled"), registered=False, root_certificates=tmp_path / "ca.crt")
    assert refused(node).startswith("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get local")


def test_a_superlink_whose_certificate_has_expired_is_refused(tmp_path):
    make_certificates(["127.0.0.1"], tmp_path)
    let_expire(tmp_path)
    with deployment(certificates=tmp_path) as running:
        said = refused(running.add_node(Site("late"), registered=False))
    assert said.startswith("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired")


def let_expire(folder):
    """Replace a server certificate by one that is the same but for its time."""
    valid = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
    ended = valid.not_valid_before_utc
    builder = x509.CertificateBuilder(valid.issuer, valid.subject, valid.public_key(), valid.serial_number)
    builder = builder.not_valid_before(ended.replace(year=ended.year - 1)).not_valid_after(ended)
    for extension in valid.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    key = load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    expired = builder.sign(key, hashes.SHA384())
    (folder / "server.pem").write_bytes(expired.public_bytes(Encoding.PEM))
