"""What TLS and SuperNode authentication need: who may read it, for whom it holds, and what is never overwritten."""

import datetime as dt
import ipaddress
import ssl
import subprocess
import sys

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.cli.supernode.register import try_load_public_key

from task.errors import ConfigError
from tests.conftest import REPOSITORY
from tools.certificates import make_certificates
from tools.node_key import make_node_key

FILES = {"ca.crt", "ca.key", "server.pem", "server.key"}


def certificate(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


def alternative_names(path):
    names = certificate(path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return set(names.get_values_for_type(x509.DNSName)), set(names.get_values_for_type(x509.IPAddress))


def mode(path):
    return path.stat().st_mode & 0o777


def handshake(server_folder, authority, host):
    """Do a TLS handshake in memory, with the checks that a SuperNode makes."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(server_folder / "server.pem", server_folder / "server.key")
    client_context = ssl.create_default_context(cafile=authority)
    client_context.verify_flags |= ssl.VERIFY_X509_STRICT
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    client = client_context.wrap_bio(to_client, to_server, server_hostname=host)
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return client.getpeercert()


def test_nodes_that_trust_the_authority_accept_the_server_under_each_of_its_names(tmp_path):
    assert make_certificates(["superlink.example.org", "10.0.0.5", "fd00::5"], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    for host in ("superlink.example.org", "10.0.0.5", "fd00::5", "localhost", "127.0.0.1"):
        assert handshake(tmp_path, tmp_path / "ca.crt", host)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(tmp_path, tmp_path / "ca.crt", "other.example.org")


def test_another_authority_of_the_same_name_is_not_accepted(tmp_path):
    make_certificates(["10.0.0.5"], tmp_path / "ours")
    make_certificates(["10.0.0.5"], tmp_path / "theirs")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path / "ours", tmp_path / "theirs" / "ca.crt", "10.0.0.5")


def test_names_and_validity(tmp_path):
    make_certificates(["10.0.0.5", "superlink.example.org", "10.0.0.5"], tmp_path)
    names, addresses = alternative_names(tmp_path / "server.pem")
    assert names == {"superlink.example.org", "localhost"}
    assert addresses == {ipaddress.ip_address("10.0.0.5"), ipaddress.ip_address("127.0.0.1")}
    now = dt.datetime.now(dt.UTC)
    for name, days in {"ca.crt": 3650, "server.pem": 825}.items():
        assert certificate(tmp_path / name).not_valid_before_utc < now
        assert abs(certificate(tmp_path / name).not_valid_after_utc - now - dt.timedelta(days=days)) < dt.timedelta(
            hours=1
        )


def test_a_server_certificate_ends_no_later_than_its_authority(tmp_path):
    make_certificates(["10.0.0.5"], tmp_path, days=9999)
    ends = [certificate(tmp_path / name).not_valid_after_utc for name in ("server.pem", "ca.crt")]
    assert abs(ends[0] - ends[1]) <= dt.timedelta(seconds=2)


def test_only_the_owner_reads_private_keys(tmp_path):
    make_certificates(["10.0.0.5"], tmp_path)
    key = make_node_key("site-1", tmp_path)
    assert [mode(path) for path in (tmp_path / "ca.key", tmp_path / "server.key", key)] == [0o600] * 3


def test_an_authority_is_used_again(tmp_path):
    make_certificates(["10.0.0.5"], tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    (tmp_path / "server.key").chmod(0o644)
    assert not make_certificates(["10.0.0.6"], tmp_path)
    after = {name: (tmp_path / name).read_bytes() for name in FILES}
    assert {name for name in FILES if before[name] == after[name]} == {"ca.crt", "ca.key"}
    assert mode(tmp_path / "server.key") == 0o600
    assert handshake(tmp_path, tmp_path / "ca.crt", "10.0.0.6")


@pytest.mark.parametrize("missing", ["ca.crt", "ca.key"])
def test_half_an_authority_is_refused_and_left_as_it_is(tmp_path, missing):
    make_certificates(["10.0.0.5"], tmp_path)
    (tmp_path / missing).unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=rf"incomplete.*{missing}"):
        make_certificates(["10.0.0.5"], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_key_of_another_authority_is_refused(tmp_path):
    make_certificates(["10.0.0.5"], tmp_path / "a")
    make_certificates(["10.0.0.5"], tmp_path / "b")
    (tmp_path / "a" / "ca.key").write_bytes((tmp_path / "b" / "ca.key").read_bytes())
    with pytest.raises(ConfigError, match="is not the key of"):
        make_certificates(["10.0.0.5"], tmp_path / "a")
    (tmp_path / "a" / "ca.key").write_text("no key")
    with pytest.raises(ConfigError, match="no PEM file"):
        make_certificates(["10.0.0.5"], tmp_path / "a")


@pytest.mark.parametrize(
    "host", ["", "https://a.example.org", "a.example.org:9092", "a b", "-a.org", "10.0.0.256", "*.org"]
)
def test_what_is_no_host_is_refused_before_anything_is_written(tmp_path, host):
    with pytest.raises(ConfigError, match="neither a DNS name nor an IP address"):
        make_certificates(["10.0.0.5", host], tmp_path / "keys")
    assert not (tmp_path / "keys").exists()


def test_a_node_key_is_what_flower_wants(tmp_path):
    private = make_node_key("clinic_a.2", tmp_path)
    key = load_ssh_private_key(private.read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp384r1"
    public = tmp_path / "clinic_a.2.pub"
    assert load_ssh_public_key(public.read_bytes()) == key.public_key()
    assert public.read_text().endswith(" clinic_a.2\n")
    assert try_load_public_key(public)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../site", "a/b", ".ssh", "-f", "a b", "sité", "a.pub", "ca", "x" * 65]
)
def test_a_name_that_is_no_safe_file_name_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot be a node's name"):
        make_node_key(name, tmp_path / "keys")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["site-1", "site-1.pub"])
def test_a_node_key_is_not_overwritten(tmp_path, there):
    (tmp_path / there).write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        make_node_key("site-1", tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("module", "given", "said"),
    [
        ("certificates", ["10.0.0.5:80"], "No certificate was made: '10.0.0.5:80' is neither"),
        ("certificates", ["10.0.0.5", "--days", "0"], "No certificate was made: A certificate holds at least 1 day"),
        ("node_key", ["../x"], "No key was made: '../x' cannot be"),
    ],
)
def test_the_commands_refuse_in_one_sentence(tmp_path, module, given, said):
    result = command(module, *given, "--out", tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith(said)
    assert result.stderr.count("\n") == 1


def test_the_commands_say_what_they_made(tmp_path):
    first = command("certificates", "10.0.0.5", "--out", tmp_path)
    assert first.returncode == 0, first.stderr
    assert f"A new authority: {tmp_path / 'ca.crt'}" in first.stdout
    assert "The authority that was there" in command("certificates", "10.0.0.5", "--out", tmp_path).stdout
    assert str(tmp_path / "site-1.pub") in command("node_key", "site-1", "--out", tmp_path).stdout


def command(module, *arguments):
    words = [sys.executable, "-m", f"tools.{module}", *map(str, arguments)]
    return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
