"""The documentation site, built once."""

import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.fixture(scope="session")
def built_site(tmp_path_factory):
    """Build the site strictly, with a proxy at which nobody listens; returns its folder."""
    site = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    built = subprocess.run(
        command, capture_output=True, text=True, cwd=REPOSITORY, env={**os.environ, **nowhere}, timeout=300, check=False
    )
    assert built.returncode == 0, built.stderr
    return site
