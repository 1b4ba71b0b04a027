"""Draw the loss curves of several revisions in one picture: python -m tools.curves OUT.png REV [REV ...]"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import vl_convert

LOSS = "results/train/plots/metrics/loss.tsv"
LOOK = {"legend": {"title": None, "orient": "top"}}


def specification(revisions: list[str]) -> dict[str, Any]:
    """The Vega-Lite chart that `dvc plots diff` makes of the losses, a colour per revision."""
    titles = ["--title", "Training loss", "--x-label", "training step", "--y-label", "mean squared error (log scale)"]
    command = ["dvc", "plots", "diff", *revisions, "--targets", LOSS, "--template", "curve_log", *titles, "--show-vega"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)  # dvc has printed the reason
    return json.loads(done.stdout) | {"width": 560, "height": 300, "config": LOOK}


def main() -> None:
    """Write the picture."""
    out, *revisions = sys.argv[1:]
    Path(out).write_bytes(vl_convert.vegalite_to_png(specification(revisions), scale=1.5))


if __name__ == "__main__":
    main()
