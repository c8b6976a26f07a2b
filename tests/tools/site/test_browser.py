"""The site in a real browser: no page asks anyone but its own server, none is wider than a phone, search finds things.

Screenshots go to ``artifacts/site/``.
"""

import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.conftest import REPOSITORY

CHROMIUM = shutil.which("chromium")
SCREENSHOTS = REPOSITORY / "artifacts" / "site"
VIEWS = [("phone", 360, 740, "dark"), ("desk", 1280, 900, "light")]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine; apt-get install chromium"),
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture(scope="module")
def address(built_site):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(built_site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(params=VIEWS, ids=[view[0] for view in VIEWS])
def page(request, tmp_path):
    """A page of a browser that reaches this machine alone, and what it asked for elsewhere or complained of."""
    from playwright.sync_api import sync_playwright

    _, width, height, scheme = request.param
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path,
            executable_path=CHROMIUM,
            headless=True,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
            viewport={"width": width, "height": height},
            color_scheme=scheme,
        )
        opened, opened_errors = context.new_page(), []
        opened.on("console", lambda said: opened_errors.append(said.text) if said.type == "error" else None)
        opened.on("pageerror", lambda error: opened_errors.append(str(error)))
        asked = []
        opened.on("request", lambda made: asked.append(made.url))
        yield opened, asked, opened_errors
        context.close()


def test_every_page_is_at_home(page, address, built_site, request):
    opened, asked, errors = page
    view = request.node.callspec.id
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for file in sorted(built_site.rglob("*.html")):
        name = str(file.relative_to(built_site))
        if name == "404.html":
            continue
        opened.goto(f"{address}/{name}")
        width = opened.evaluate("document.documentElement.scrollWidth")
        assert width <= opened.viewport_size["width"], f"{name} is {width} pixels wide"
        opened.screenshot(path=SCREENSHOTS / f"{name.replace('/', '-')}-{view}.png")
    assert len(asked) > 100
    assert [url for url in asked if not url.startswith((address, "data:"))] == []
    assert errors == []


def test_search_finds_a_key(page, address):
    opened, _, errors = page
    opened.goto(f"{address}/index.html")
    if opened.viewport_size["width"] < 600:
        opened.locator("label.md-header__button[for=__search]").click()
    opened.locator("input.md-search__input").click()
    opened.keyboard.type("proximal_mu", delay=20)
    opened.locator(".md-search-result__link").first.wait_for(timeout=20_000)
    assert "reference/config.html" in opened.locator(".md-search-result__list").inner_html()
    assert errors == []
