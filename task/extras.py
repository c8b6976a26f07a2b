"""Packages that only some commands need."""

import importlib.util
from collections.abc import Sequence

from task.errors import ConfigError


def require_extra(extra: str, packages: Sequence[str]) -> None:
    """Refuse early what would fail for want of a package.

    Parameters
    ----------
    extra : str
        The app's optional dependencies that hold the packages.
    packages : Sequence[str]
        Names under which they are imported.

    Raises
    ------
    ConfigError
        If one is missing, with the command that installs it.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be installed: pip install -c constraints.txt -e '.[{extra}]'.")
