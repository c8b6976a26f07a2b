"""What loading the ClientApp does to a process: little, as one starts for every message of a deployment."""

import json
import os
import subprocess
import sys

import pytest

SHOW = (
    "import client_app.entry, json, os, sys; "
    "print(json.dumps([{k: v for k, v in os.environ.items() if k.startswith('RAY_')}, sorted(sys.modules)]))"
)


def loaded(**environment):
    """Load it in a fresh process; return Ray's variables, and the modules that are imported then."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", SHOW], env={**kept, **environment}, capture_output=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def fresh():
    return loaded()


def test_ray_will_send_messages_along_with_calls(fresh):
    """Flower's engine loads the ClientApp first, and starts Ray then; tests of whole runs see that they still work."""
    assert fresh[0] == {
        "RAY_max_direct_call_object_size": "16777216",
        "RAY_task_rpc_inlined_bytes_limit": "67108864",
    }
    assert "ray" not in fresh[1]  # which reads them when it is imported


def test_what_a_user_has_set_stays():
    settings, _ = loaded(RAY_max_direct_call_object_size="1000")
    assert settings["RAY_max_direct_call_object_size"] == "1000"
