"""The built site: everything that its pages load or link to is in it, and equations are MathML."""

import re
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt

from tests.conftest import REPOSITORY

LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("video", "src"), ("object", "data")}
FOR_PEOPLE = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").rglob("*.md")),
)

pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """What a page loads, what it links to, and the anchors it has."""

    def __init__(self, path):
        super().__init__()
        self.path, self.loads, self.links, self.anchors, self.styles = path, [], [], set(), []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.loads += [given[name] for kind, name in LOADED if kind == tag and given.get(name)]
        self.loads += [given["href"]] if tag == "link" and given.get("href") else []
        self.links += [given["href"]] if tag == "a" and given.get("href") else []
        self.anchors |= {given.get("id"), given.get("name")}
        self.styles += [given["style"]] if given.get("style") else []


@pytest.fixture(scope="module")
def pages(built_site):
    found = {path.resolve(): Page(path) for path in built_site.rglob("*.html")}
    assert len(found) > 20
    return found


def test_pages_load_nothing_from_elsewhere(pages, built_site):
    for page in pages.values():
        for url in page.loads:
            assert not urlsplit(url).netloc, f"{page.path.name} loads {url}"
        assert "url(" not in "".join(page.styles)
        assert "mermaid" not in page.path.read_text("utf-8"), "Material would fetch the script that draws it"
    for sheet in built_site.rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//", sheet.read_text("utf-8")), sheet.name


def test_every_link_between_pages_holds(pages):
    followed = 0
    for page in pages.values():
        for url in [*page.loads, *page.links]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc or url.startswith("/"):  # 404.html alone has absolute ones
                assert not url.startswith("/") or page.path.name == "404.html", url
                continue
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path.resolve()
            assert target.exists(), f"{page.path.name} links to {url}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, f"{page.path.name} links to {url}"
            followed += 1
    assert followed > 500


def test_every_equation_became_mathml(pages):
    texts = [page.path.read_text("utf-8") for page in pages.values()]
    assert not [text for text in texts if 'class="arithmatex"' in text]
    equations = [found for text in texts for found in re.findall(r"<math.*?</math>", text, re.DOTALL)]
    assert equations


@pytest.mark.parametrize("name", FOR_PEOPLE)
def test_links_hold_where_github_shows_the_pages(name):
    page = REPOSITORY / name
    tokens = [
        child for token in MarkdownIt().enable("table").parse(page.read_text("utf-8")) for child in token.children or []
    ]
    links = [token.attrGet("href") or token.attrGet("src") for token in tokens if token.type in ("link_open", "image")]
    for url in links:
        parts = urlsplit(url)
        if parts.scheme:
            continue
        target = page.parent / unquote(parts.path) if parts.path else page
        assert target.exists(), f"{name} links to {url}"
        if parts.fragment:
            assert parts.fragment in anchors(target), f"{name} links to {url}"


def anchors(page):
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
