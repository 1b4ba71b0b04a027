"""Put the charts' JavaScript into the plots page, so that the page needs no network: python tools/plots_page.py OUT"""

import sys
from pathlib import Path

import vl_convert

PAGE = Path(".dvc/plots/page.html")

if __name__ == "__main__":
    # where DVC would put three addresses to load from
    script = f"<script>{vl_convert.javascript_bundle('window.vegaEmbed = vegaEmbed')}</script>"
    out = Path(sys.argv[1])
    out.parent.mkdir(exist_ok=True)
    out.write_text(PAGE.read_text(encoding="utf-8").replace("{scripts}", script), encoding="utf-8")
