"""Write the reference of all config keys: ``python -m tools.site`` (docs/reference/config.md)."""

from pathlib import Path

from tools.site.reference import reference_page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "config.md"


def main() -> None:
    """Write the page where it stands among the docs."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(reference_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
