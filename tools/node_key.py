"""Make the key pair by which a SuperNode proves who it is, as ``ssh-keygen -t ecdsa -b 384`` does.

Run: ``python -m tools.node_key site-1 --out deploy/keys``. The private key stays on the node; the ``.pub`` file is
registered at the SuperLink.
"""

import argparse
import re
import sys
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from task.errors import ConfigError, PetalwiseError
from tools.certificates import CA_CERTIFICATE, FOLDER, SERVER_CERTIFICATE, write_private

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TAKEN = frozenset(Path(name).stem for name in (CA_CERTIFICATE, SERVER_CERTIFICATE))


def make_node_key(name: str, folder: Path) -> Path:
    """Write an ECDSA P-384 key pair in OpenSSH's format: ``name`` and ``name.pub``.

    Parameters
    ----------
    name : str
        Name of the node; becomes the file name and the key's comment.
    folder : Path
        Where the files go; made if it does not exist.

    Returns
    -------
    Path
        The private key.

    Raises
    ------
    ConfigError
        If the name is no safe file name, or either file exists already.
    """
    if not _NAME.fullmatch(name) or name.endswith((".pub", ".part")) or Path(name).stem in _TAKEN:
        raise ConfigError(
            f"{name!r} cannot be a node's name here: take up to 64 of the characters a-z, A-Z, 0-9, '.', '_' and '-', "
            f"beginning with a letter or digit, not ending in .pub or .part, and none of {', '.join(sorted(_TAKEN))}."
        )
    private, public = folder / name, folder / f"{name}.pub"
    for path in (private, public):
        if path.exists():
            raise ConfigError(f"{path} exists already and is not overwritten: move it away for a new key.")
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    write_private(private, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    text = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    public.write_text(f"{text} {name}\n")
    return private


def main() -> None:
    """Read the command line, write the key pair, say where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the node, such as site-1")
    parser.add_argument("--out", type=Path, default=FOLDER, help=f"folder for the files (default: {FOLDER})")
    given = parser.parse_args()
    try:
        private = make_node_key(given.name, given.out)
    except PetalwiseError as error:
        sys.exit(f"No key was made: {error}")
    except OSError as error:
        sys.exit(f"No key was made: {error.filename} cannot be written ({error.strerror}).")
    print(f"{private}: the private key, for the node alone")
    print(f"{private}.pub: register it with `flwr supernode register {private}.pub prod --name {given.name}`")


if __name__ == "__main__":
    main()
