from types import SimpleNamespace

import pytest
from mkdocs.exceptions import PluginError

from tools.site.hooks import on_page_content

PAGE = SimpleNamespace(file=SimpleNamespace(src_uri="strategies/fedavg.md"))


def test_marked_equations_become_mathml_and_all_else_stays():
    html = (
        '<p>5 $ <span class="arithmatex">\\(x &lt; \\frac{1}{2}\\)</span></p><div class="arithmatex">\\[\ny\n\\]</div>'
    )
    made = on_page_content(html, page=PAGE)
    assert made.startswith('<p>5 $ <math xmlns="http://www.w3.org/1998/Math/MathML" display="inline"><mrow><mi>x</mi>')
    assert "<mfrac><mrow><mn>1</mn></mrow><mrow><mn>2</mn></mrow></mfrac></mrow></math></p>" in made
    assert made.endswith('display="block"><mrow><mi>y</mi></mrow></math></div>')


def test_an_unknown_command_stops_the_build_with_page_and_command():
    with pytest.raises(
        PluginError, match=r"docs/strategies/fedavg.md: latex2mathml does not know \\argh in '\\\\argh'"
    ):
        on_page_content('<span class="arithmatex">\\(\\argh\\)</span>', page=PAGE)
