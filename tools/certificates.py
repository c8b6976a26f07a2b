"""Make what TLS needs: a certificate authority of one's own and the SuperLink's certificate.

Run: ``python -m tools.certificates superlink.example.org 10.0.0.5 --out deploy/keys``. An authority that lies in the
folder already is used again, so that the nodes' ca.crt stays valid when the server's certificate is renewed.
"""

import argparse
import datetime as dt
import ipaddress
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from task.errors import ConfigError, PetalwiseError

FOLDER = Path("deploy/keys")
CA_CERTIFICATE, CA_KEY = "ca.crt", "ca.key"
SERVER_CERTIFICATE, SERVER_KEY = "server.pem", "server.key"
CA_DAYS = 3650
SERVER_DAYS = 825
"""What Apple's systems accept at most of a certificate whose authority was added by hand."""
BACKDATED = dt.timedelta(hours=1)
"""A certificate holds from a little before it was made: clocks differ."""
ALWAYS = ("localhost", "127.0.0.1")
"""The SuperLink's own helpers reach it by the loopback address."""

_DNS_NAME = re.compile(
    r"(?=.{1,253}$)(?!.*\.[0-9]+$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*", re.I
)


def make_certificates(hosts: Sequence[str], folder: Path, days: int = SERVER_DAYS) -> bool:
    """Write the server's certificate and key, and the authority's where there is none yet.

    Parameters
    ----------
    hosts : Sequence[str]
        DNS names and IP addresses by which nodes and people reach the SuperLink.
    folder : Path
        Where the files go; made if it does not exist.
    days : int, default 825
        How long the server's certificate holds, never longer than the authority's.

    Returns
    -------
    bool
        Whether the authority is new.

    Raises
    ------
    ConfigError
        On a host that is neither a DNS name nor an IP address, or on an authority that cannot be used.
    """
    names = [_general_name(host) for host in dict.fromkeys([*hosts, *ALWAYS])]
    if days < 1:
        raise ConfigError(f"A certificate holds at least 1 day, not {days}.")
    folder.mkdir(parents=True, exist_ok=True)
    new = not any((folder / name).exists() for name in (CA_CERTIFICATE, CA_KEY))
    if new:
        key, authority = _make_authority()
        write_private(folder / CA_KEY, _pem(key))
        (folder / CA_CERTIFICATE).write_bytes(authority.public_bytes(Encoding.PEM))
    else:
        key, authority = _load_authority(folder)
    server_key = ec.generate_private_key(ec.SECP384R1())
    certificate = _server_certificate(server_key, names, hosts[0], key, authority, days)
    write_private(folder / SERVER_KEY, _pem(server_key))
    (folder / SERVER_CERTIFICATE).write_bytes(certificate.public_bytes(Encoding.PEM))
    return new


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, at no moment readable by others."""
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _general_name(host: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    if not _DNS_NAME.fullmatch(host):
        raise ConfigError(f"{host!r} is neither a DNS name nor an IP address: give it without a port or https://.")
    return x509.DNSName(host)


def _make_authority() -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Petalwise federation CA")])
    builder = _builder(name, name, key.public_key(), dt.timedelta(days=CA_DAYS))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(authority=True), critical=True)
    return key, builder.sign(key, hashes.SHA384())


def _load_authority(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    try:
        key = load_pem_private_key((folder / CA_KEY).read_bytes(), password=None)
        authority = x509.load_pem_x509_certificate((folder / CA_CERTIFICATE).read_bytes())
    except OSError as error:
        raise ConfigError(
            f"The authority in {folder} is incomplete: {error.filename} cannot be read ({error.strerror}). "
            f"Put it back, or move both {CA_CERTIFICATE} and {CA_KEY} away for a new one."
        ) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{CA_CERTIFICATE} or {CA_KEY} in {folder} is no PEM file without password.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != authority.public_key():
        raise ConfigError(f"{CA_KEY} in {folder} is not the key of {CA_CERTIFICATE}.")
    if authority.not_valid_after_utc <= dt.datetime.now(dt.UTC):
        raise ConfigError(
            f"The authority in {folder} has expired on {authority.not_valid_after_utc:%Y-%m-%d}: move {CA_CERTIFICATE} "
            f"and {CA_KEY} away and give every node the new {CA_CERTIFICATE}."
        )
    return key, authority


def _server_certificate(
    key: ec.EllipticCurvePrivateKey,
    names: Sequence[x509.GeneralName],
    common_name: str,
    authority_key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    days: int,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])
    left = authority.not_valid_after_utc - dt.datetime.now(dt.UTC)
    builder = _builder(subject, authority.subject, key.public_key(), min(dt.timedelta(days=days), left))
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(authority=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.add_extension(issuer, critical=False).sign(authority_key, hashes.SHA384())


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, validity: dt.timedelta
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public_key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - BACKDATED).not_valid_after(now + validity)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def main() -> None:
    """Read the command line, write the files, say where they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hosts", nargs="+", help="DNS names and IP addresses of the SuperLink")
    parser.add_argument("--out", type=Path, default=FOLDER, help=f"folder for the files (default: {FOLDER})")
    parser.add_argument("--days", type=int, default=SERVER_DAYS, help=f"validity (default: {SERVER_DAYS} days)")
    given = parser.parse_args()
    try:
        new = make_certificates(given.hosts, given.out, given.days)
    except PetalwiseError as error:
        sys.exit(f"No certificate was made: {error}")
    except OSError as error:
        sys.exit(f"No certificate was made: {error.filename} cannot be written ({error.strerror}).")
    print(
        f"{'A new authority' if new else 'The authority that was there'}: {given.out / CA_CERTIFICATE}, for every node"
    )
    print(f"A new server certificate for {', '.join(given.hosts)}: {given.out / SERVER_CERTIFICATE}")
    print(f"Keep {CA_KEY} where only you can read it, and {SERVER_KEY} on the SuperLink's host.")


if __name__ == "__main__":
    main()
