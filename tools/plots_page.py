"""Put the charts' JavaScript into the plots page, so that the page needs no network: python -m tools.plots_page OUT"""

import sys
from pathlib import Path

import vl_convert

PAGE = Path(".dvc/plots/page.html")


def page(template: str) -> str:
    """The page with the charts' JavaScript in it, where DVC would put three addresses to load from."""
    script = f"<script>{vl_convert.javascript_bundle('window.vegaEmbed = vegaEmbed')}</script>"
    return template.replace("{scripts}", script)


def main() -> None:
    """Write the page."""
    out = Path(sys.argv[1])
    out.parent.mkdir(exist_ok=True)
    out.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
