"""What a client answers in each stage of SecAgg+ is checked before Flower's workflow reads it."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from flwr.common import bytes_to_ndarray
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common.recorddict_compat import recorddict_to_fitres
from flwr.supercore.primitives.asymmetric import bytes_to_public_key

from task.errors import MessageError
from task.messages import CONFIG, METRICS

MAX_KEY_BYTES = 4096
"""Keys, shares and ciphertexts of shares have some hundred bytes."""
MAX_HEADER_BYTES = 1024
"""Of an array in numpy's format."""


def check_stage(stage: str, content: RecordDict, named: Collection[int], size: int) -> None:
    """Check a reply of a stage.

    Parameters
    ----------
    stage : str
        Flower's name of the stage.
    content : RecordDict
        Of the reply.
    named : Collection[int]
        Node ids that its shares must be for, or of: those that the message of the stage named.
    size : int
        Number of values of an update.

    Raises
    ------
    MessageError
        Saying what is wrong with it.
    """
    record = content.config_records.get(RECORD_KEY_CONFIGS)
    if record is None:
        raise MessageError("it answers nothing of secure aggregation.")
    if stage == Stage.SETUP:
        _check_keys(record)
    elif stage == Stage.SHARE_KEYS:
        _check_shares(record, Key.DESTINATION_LIST, Key.CIPHERTEXT_LIST, named)
    elif stage == Stage.COLLECT_MASKED_VECTORS:
        _check_masked(record, content, size)
    else:
        _check_shares(record, Key.NODE_ID_LIST, Key.SHARE_LIST, named)


def _check_keys(record: ConfigRecord) -> None:
    """Expect two public keys: the other clients would fail on one that is none."""
    for name in (Key.PUBLIC_KEY_1, Key.PUBLIC_KEY_2):
        key = record.get(name)
        if not isinstance(key, bytes) or len(key) > MAX_KEY_BYTES:
            raise MessageError(f"it has no key under {name!r}.")
        _tried(partial(bytes_to_public_key, key), f"what it has under {name!r} is no key")


def _check_shares(record: ConfigRecord, to: str, what: str, named: Collection[int]) -> None:
    """Expect a share for each node that was named, no more and no fewer."""
    theirs, shares = record.get(to), record.get(what)
    if not isinstance(theirs, list) or not isinstance(shares, list) or len(theirs) != len(shares):
        raise MessageError(f"its lists {to!r} and {what!r} do not belong together.")
    if len(theirs) != len(named) or set(theirs) != set(named):
        raise MessageError(f"its list {to!r} names other nodes than it was asked for.")
    if not all(isinstance(share, bytes) and len(share) <= MAX_KEY_BYTES for share in shares):
        raise MessageError(f"its list {what!r} holds what is no share.")


def _check_masked(record: ConfigRecord, content: RecordDict, size: int) -> None:
    """Expect a weight and an update of whole numbers, and the records that every train reply has."""
    found = record.get(Key.MASKED_PARAMETERS)
    if not isinstance(found, list) or len(found) != 2:
        raise MessageError("it has no masked weight and update.")
    for values, shape in zip(found, ((1,), (size,)), strict=True):
        if not isinstance(values, bytes):
            raise MessageError("its masked values are no bytes.")
        if len(values) > 8 * shape[0] + MAX_HEADER_BYTES:
            raise MessageError(f"its masked values have {len(values)} bytes, {8 * shape[0]} and a header are expected.")
        array = _tried(partial(bytes_to_ndarray, values), "its masked values cannot be read")
        if not isinstance(array, np.ndarray):
            raise MessageError("its masked values are no array.")
        if array.shape != shape or array.dtype != np.int64:
            raise MessageError(f"its masked values are {array.dtype} {array.shape}, not int64 {shape}.")
    _tried(partial(recorddict_to_fitres, content, keep_input=True), "it has no result in Flower's form")
    if CONFIG not in content.config_records or METRICS not in content.metric_records:
        raise MessageError(f"it has no records {CONFIG!r} and {METRICS!r}.")


def _tried(read: Callable[[], Any], otherwise: str) -> Any:
    """Read what a client sent; whatever Flower's code makes of nonsense becomes a MessageError."""
    try:
        return read()
    except Exception as error:
        raise MessageError(f"{otherwise} ({type(error).__name__}).") from error
