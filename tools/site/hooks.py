"""MkDocs hooks: equations become MathML while the site is built, so that its pages need no script for them."""

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

_EQUATION = re.compile(
    r"<(?P<tag>span|div) class=\"arithmatex\">\s*\\(?:\((?P<inline>.*?)\\\)|\[(?P<block>.*?)\\\])\s*</(?P=tag)>",
    re.DOTALL,
)


def on_page_content(html: str, **_: Any) -> str:
    """Replace the equations that ``pymdownx.arithmatex`` has marked by MathML.

    Parameters
    ----------
    html : str
        A page's content.

    Returns
    -------
    str
        The content with ``<math>`` in their places; a browser that knows no MathML shows their symbols in one line.
    """
    return _EQUATION.sub(_mathml, html)


def _mathml(found: re.Match[str]) -> str:
    if found["block"] is not None:
        return f'<div class="equation">{convert(unescape(found["block"]).strip(), display="block")}</div>'
    return str(convert(unescape(found["inline"]).strip()))
