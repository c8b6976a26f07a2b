"""The page in a real browser: no error, nothing fetched, every plot drawn, keys and screen readers served.

Screenshots go to ``artifacts/report/``.
"""

import shutil

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tools.report.page import render
from tools.report.reading import read_runs

CHROMIUM = shutil.which("chromium")
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SCREENSHOTS = REPOSITORY / "artifacts" / "report"
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}
ALPHA = "run-3-alpha"
VALUES = "key => Array.from(document.getElementById(key).calcdata[0][0].z, row => Array.from(row))"
TEXT_COLOUR = "key => getComputedStyle(document.querySelector(`#${key} .xtick text`)).fill"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine; apt-get install chromium"),
]


@pytest.fixture(scope="module")
def runs(folders):
    return read_runs(list(folders.values()))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A Chromium with an empty profile and without network."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=CHROMIUM,
            headless=True,
            args=OPTIONS,
            offline=True,
            viewport=DESK,
            reduced_motion="reduce",
        )
        yield context
        context.close()


@pytest.fixture(scope="module")
def page(browser, runs, tmp_path_factory):
    """The page, all plots drawn; what the console said and what was asked for are in its attributes."""
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render(runs), encoding="utf-8")
    page = browser.new_page()
    page.set_default_timeout(300_000)  # milliseconds; a busy machine draws slowly
    page.told, page.asked = [], []
    page.on("console", lambda message: page.told.append(message.text))
    page.on("pageerror", lambda error: page.told.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_function(
        "() => [...document.querySelectorAll('.plot')].every(plot => plot.querySelector('.main-svg'))"
    )
    return page


def screenshot(page, name):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def test_it_loads_without_error_and_fetches_nothing(page):
    screenshot(page, "desk-light")
    assert page.told == []
    assert set(page.asked) == {page.url}


def test_every_plot_has_marks_and_a_title(page):
    plots = page.locator(".plot").all()
    assert len(plots) == 19
    for plot in plots:
        assert plot.locator("image, .point, .scatterlayer path").count() > 0, plot.get_attribute("id")
        assert plot.bounding_box()["height"] > 150


def test_the_slider_goes_through_the_rounds_by_keys(page, runs):
    recorded = [np.array(report.details["alpha"]) for report in runs[2].reports[1:]]
    slider, told = page.locator(f"[data-round={ALPHA}]"), page.locator(f"[data-told={ALPHA}]")
    slider.focus()
    for key, number in (("Home", 1), ("ArrowRight", 2), ("End", 3), ("ArrowLeft", 2)):
        page.keyboard.press(key)
        assert told.text_content() == str(number)
        assert slider.get_attribute("aria-valuetext") == f"round {number}"
        np.testing.assert_allclose(page.evaluate(VALUES, ALPHA), recorded[number - 1][:, 0], atol=1e-6)


def test_another_unit_is_shown_in_the_same_round(page, runs):
    page.locator(f"[data-choice={ALPHA}]").select_option("head")
    number = int(page.locator(f"[data-told={ALPHA}]").text_content())
    recorded = np.array(runs[2].reports[number].details["alpha"])[:, -1]
    np.testing.assert_allclose(page.evaluate(VALUES, ALPHA), recorded, atol=1e-6)


def test_a_screen_reader_finds_name_summary_and_table(page):
    for plot in page.locator(".plot").all():
        figure = plot.locator("xpath=ancestor::figure")
        name = figure.locator("h3").text_content()
        assert page.get_by_role("img", name=name, exact=True).count() > 0
        assert figure.locator("figcaption p").text_content().strip()
        assert plot.get_attribute("aria-describedby") == figure.locator("figcaption p").get_attribute("id")
        assert figure.locator("tbody tr").count() > 0
    assert page.get_by_role("slider", name="Round").count() == 3
    assert page.get_by_role("main").count() == page.get_by_role("navigation").count() == 1


def test_keys_alone_reach_the_plots_and_open_a_table(page):
    page.reload()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the plots"
    summary = page.locator("figure summary").first
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("figure details[open] table").count() == 1
    page.keyboard.press("Enter")
    assert page.locator("figure details[open] table").count() == 0


def test_colours_follow_the_system_without_reloading(page):
    colours = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(500)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        colours[scheme] = background, page.evaluate(TEXT_COLOUR, "central-by-round")
    screenshot(page, "desk-dark")
    assert colours == {
        "light": ("rgb(255, 255, 255)", "rgb(28, 33, 38)"),
        "dark": ("rgb(20, 24, 29)", "rgb(230, 233, 236)"),
    }


def test_a_phone_shows_all_of_it_without_scrolling_sideways(page):
    page.emulate_media(color_scheme="light")
    page.set_viewport_size(PHONE)
    page.wait_for_timeout(1000)
    screenshot(page, "phone")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for plot in page.locator(".plot").all():
        drawn = plot.locator(".main-svg").first.bounding_box()
        assert 0 <= drawn["x"] < drawn["x"] + drawn["width"] <= PHONE["width"], plot.get_attribute("id")


def test_nothing_was_told_or_fetched_meanwhile(page):
    assert page.told == []
    assert set(page.asked) == {page.url}
