"""A party's own folders, and how to speak of its files to others without telling where they lie."""

import os
import re
from collections.abc import Mapping
from logging import ERROR
from pathlib import Path

from flwr.common.logger import log

from task.errors import DataError

_FOLDERS = re.compile(
    r"""(?<=['"])/[^'"\n]*/"""  # in quotes, where folders may have blanks
    r"""|(?<![\w:/.'"])/(?:[^\s/'"]+/)+"""  # bare; the path of an address is none
)


def node_folder(node_config: Mapping[str, object], key: str, variable: str) -> Path | None:
    """Find one of this party's own folders.

    Parameters
    ----------
    node_config : Mapping[str, object]
        The node's own config.
    key : str
        Its key that names the folder.
    variable : str
        The environment variable that names the folder where the node config does not.

    Returns
    -------
    Path or None
        The folder, absolute; None where neither is set.

    Raises
    ------
    DataError
        If there is no such folder.
    """
    named = str(node_config.get(key) or os.environ.get(variable, ""))
    if not named:
        return None
    folder = Path(named).expanduser().absolute()
    if not os.path.isdir(folder):  # unlike Path.is_dir also where its parent may not be read
        log(ERROR, "%s is no folder.", folder)
        origin = f'the node config\'s key "{key}"' if node_config.get(key) else f"the environment's {variable}"
        raise DataError(f"There is no folder '{folder.name}' on this node where {origin} says; correct it.")
    return folder


def reason_of(error: BaseException) -> str:
    """Say another library's error in words that may go to another party: of paths, only the last part.

    The error as it was is logged here.
    """
    told = str(error).strip() or type(error).__name__
    log(ERROR, "%s", told)
    return without_folders(told)


def without_folders(text: str) -> str:
    """Leave only the last part of every path in a text."""
    return _FOLDERS.sub("", text.replace("file://", ""))
