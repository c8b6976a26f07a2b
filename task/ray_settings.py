"""How Ray, on which Flower's simulation engine runs clients, sends messages to them; imports nothing large."""

import os

RAY_SETTINGS = {
    "RAY_max_direct_call_object_size": str(2**24),
    "RAY_task_rpc_inlined_bytes_limit": str(2**26),
}
"""Bytes up to which Ray sends a message along with the call of a simulated client, and all of a call together. By
itself it puts what has more than 100 kB into its object store, which takes several exchanges between processes."""


def set_up_ray() -> None:
    """Set Ray's environment variables where the user has not; to be called by what a ClientApp is loaded from.

    Flower's engine loads the ClientApp before it imports and starts Ray.
    """
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
