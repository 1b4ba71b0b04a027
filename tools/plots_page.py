"""Write the page of numbers, curves and pictures, which needs no network: python -m tools.plots_page OUT [REV ...]

Without a revision the page shows the working tree; one revision is shown beside the working tree.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vl_convert
from dvc.exceptions import DvcException
from dvc.render.match import match_defs_renderers
from dvc.repo import Repo
from dvc.repo.plots.diff import diff
from dvc.utils.flatten import flatten
from dvc_render import render_html

from ddpm.evaluation.card import measured
from tools.common.experiments import METRICS, differing, shown

PAGE = Path(".dvc/plots/page.html")
MOST_POINTS = 500  # of a curve: more than its chart has columns of pixels


def page(template: str, facts: dict[str, Any]) -> str:
    """The page with the facts, and with the charts' JavaScript itself where DVC would put three addresses of it."""
    script = f"<script>{vl_convert.javascript_bundle('window.vegaEmbed = vegaEmbed')}</script>"
    return template.replace("{scripts}", script).replace("{facts}", json.dumps(facts).replace("<", "\\u003c"))


def thinned(rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """At most MOST_POINTS rows of a curve: the lowest and the highest of each stretch, so that no spike is lost.

    The value is the last column, as DVCLive writes it.
    """
    if len(rows) <= MOST_POINTS:
        return rows
    value, stretches = list(rows[0])[-1], MOST_POINTS // 2
    kept = []
    for i in range(stretches):
        places = range(i * len(rows) // stretches, (i + 1) * len(rows) // stretches)
        kept += sorted({choose(places, key=lambda place: float(rows[place][value])) for choose in (min, max)})
    return [rows[place] for place in kept]


def thin(plots: dict[str, Any]) -> dict[str, int]:
    """Thin the curves of DVCLive in the plots that DVC has collected; return how many points the thinned ones had."""
    longest: dict[str, int] = {}
    for of_revision in plots.values():
        for name, file in of_revision.get("sources", {}).get("data", {}).items():
            rows = file.get("data")
            if name.endswith(".tsv") and isinstance(rows, list) and len(rows) > MOST_POINTS:
                longest[name] = max(longest.get(name, 0), len(rows))
                file["data"] = thinned(rows)
    return longest


def table(trees: dict[str, dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """A row per name: its heading, and the value in each revision; a number with its standard error."""
    rows = []
    for name in names:
        values = {
            rev: measured(tree, name) if name in METRICS or f"{name}_se" in tree else shown(name, tree[name])
            for rev, tree in trees.items()
            if name in tree
        }
        rows.append({"name": METRICS[name].heading if name in METRICS else name, "values": values})
    return rows


def facts(repo: Repo, revisions: Sequence[str]) -> dict[str, Any]:
    """The facts at the top of the page: the numbers, and the parameters that differ between the revisions."""
    metrics, params = (
        {rev: _values(found.get(rev, {}).get("data", {})) for rev in revisions}
        for found in (
            repo.metrics.show(revs=list(revisions), hide_workspace="workspace" not in revisions),
            repo.params.show(revs=list(revisions), hide_workspace="workspace" not in revisions),
        )
    )
    known = dict.fromkeys(
        name for tree in metrics.values() for name in tree if not (name.endswith("_se") and name[:-3] in tree)
    )
    return {
        "numbers": table(metrics, [name for name in METRICS if name in known]),
        "further": table(metrics, [name for name in known if name not in METRICS]),
        "params": table(params, differing(list(params.values()))),
    }


def _values(files: dict[str, Any]) -> dict[str, Any]:
    """All files of one revision as one flat mapping; the names of the training's metrics end in "(training)"."""
    return {
        f"{key} (training)" if path.startswith("results/train/") else key: value
        for path, file in files.items()
        for key, value in flatten(file.get("data") or {}).items()
    }


def write(out: Path, revisions: Sequence[str]) -> Path:
    """Write the page into the folder `out`.

    Raises:
        DvcException: there is no such revision.
        SystemExit: no revision has anything to show.
    """
    with Repo() as repo:
        plots = diff(repo, revs=list(revisions)) if revisions else repo.plots.show()
        if not plots:
            sys.exit("error: there is nothing to plot: run the pipeline first (make repro)")
        points = thin(plots)
        opening = facts(repo, list(plots)) | {"points": points, "most": MOST_POINTS}
        found = match_defs_renderers(plots, out=str(out / "static"), templates_dir=repo.plots.templates_dir)
        with tempfile.NamedTemporaryFile("w", suffix=".html", encoding="utf-8") as template:  # DVC takes a path
            template.write(page(PAGE.read_text(encoding="utf-8"), opening))
            template.flush()
            return Path(render_html([one.renderer for one in found], out.resolve() / "index.html", template.name))


def main() -> None:
    """Write the page, and print its address."""
    out, *revisions = sys.argv[1:]
    try:
        print(write(Path(out), revisions).as_uri())
    except DvcException as error:
        sys.exit(f"error: REV: {error}")


if __name__ == "__main__":
    main()
