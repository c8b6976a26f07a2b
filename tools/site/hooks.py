"""MkDocs hooks: equations become MathML while the site is built, so that its pages need no script for them."""

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

_EQUATION = re.compile(
    r"<(?P<tag>span|div) class=\"arithmatex\">\s*\\(?:\((?P<inline>.*?)\\\)|\[(?P<block>.*?)\\\])\s*</(?P=tag)>",
    re.DOTALL,
)


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Replace the equations that ``pymdownx.arithmatex`` has marked by MathML.

    Parameters
    ----------
    html : str
        A page's content.
    page : Page
        The page.

    Returns
    -------
    str
        The content with ``<math>`` in their places.

    Raises
    ------
    PluginError
        If an equation has a command that latex2mathml does not know.
    """
    return _EQUATION.sub(lambda found: _mathml(found, page.file.src_uri), html)


def _mathml(found: re.Match[str], page: str) -> str:
    block = found["block"] is not None
    latex = unescape(found["block"] if block else found["inline"]).strip()
    math = str(convert(latex, display="block" if block else "inline"))
    if unknown := re.search(r"\\[a-zA-Z]+", math):  # what latex2mathml does not know it leaves as it is
        raise PluginError(
            f"docs/{page}: latex2mathml does not know {unknown[0]} in {latex!r}; write it in another way."
        )
    return f'<div class="equation">{math}</div>' if block else math
