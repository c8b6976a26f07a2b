"""Errors that a person is meant to read: what was wrong, where, and what to do."""

import difflib
from collections.abc import Iterable, Sequence


class PetalwiseError(Exception):
    """Base of the errors whose message is written for the user; shown without a traceback."""


class ConfigError(PetalwiseError):
    """A config key, value or combination that cannot be run."""


class DataError(PetalwiseError):
    """Data that is missing, unreadable or not what the config says."""


class ModelError(PetalwiseError):
    """A backbone or adapter that cannot be built as configured."""


class MessageError(PetalwiseError):
    """A message or reply whose content is not what the contract asks for."""


class StateError(PetalwiseError):
    """State that a client or the server cannot keep or read."""


class TooFewClientsError(PetalwiseError):
    """Too few clients gave usable replies for the run to go on."""


class OtherClientsError(TooFewClientsError):
    """The clients of a run that is to go on are not there, but others; nothing of the run has been changed."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Suggest the choice nearest to a mistyped word, as a sentence with a blank before it; empty if none is near."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def shortened(items: Sequence[str], most: int = 5) -> str:
    """Join the first items by commas and say how many more there are."""
    more = len(items) - most
    return ", ".join(items[:most]) + (f" and {more} more" if more > 0 else "")
