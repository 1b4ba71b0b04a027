"""Render the numbers of a run as a page of tables and plots."""

import json
import statistics
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import vl_convert
from PIL import Image

RESULTS = Path(__file__).parent / "results"
HEAD = """# Measured side by side

Written by `make bench`; do not edit. Each contender is loaded in its own process, and they take turns, so that all see
the same machine, with the same GOMP_SPINCOUNT. The run should be alone: other load slows all contenders alike. Each
number is the median over the rounds, with the lowest and the highest.
"""
SMOKE = "\n**A smoke run (`--quick`), to check that everything works: its numbers mean nothing.**\n"

Turns = dict[str, list[dict[str, Any]]]  # the answers of each contender


class Spread(NamedTuple):
    """The lowest, the median and the highest of several measurements."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """The spread of one value or more."""
        ordered = sorted(values)
        return cls(ordered[0], statistics.median(ordered), ordered[-1])

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def faster(turns: Turns, ours: str, theirs: str) -> Spread:
    """How many times as fast as `theirs` `ours` is: the spread of the ratio in each round."""
    return Spread.of(b["seconds"] / a["seconds"] for a, b in zip(turns[ours], turns[theirs], strict=True))


def peak(answers: list[dict[str, Any]]) -> str:
    """The peak of memory in MiB, as text."""
    return f"{max(answer['mib'] for answer in answers):,.0f}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in markdown; all columns but the first are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def bars(turns: Turns, images: int) -> dict[str, Any]:
    """A chart of images per second; `images` is the number of images per step or batch."""
    spreads = {name: Spread.of(images / answer["seconds"] for answer in answers) for name, answers in turns.items()}
    rows = [{"name": name, "ours": name.startswith("ours")} | spread._asdict() for name, spread in spreads.items()]
    y = {"field": "name", "sort": None, "title": None, "axis": {"labelLimit": 400}}
    x = {"field": "median", "type": "quantitative", "title": "images per second"}
    rule = {"x": {"field": "low", "type": "quantitative"}, "x2": {"field": "high"}}
    color = {"field": "ours", "legend": None}
    layer = [{"mark": "bar", "encoding": {"x": x, "color": color}}, {"mark": "rule", "encoding": rule}]
    return {"width": 420, "data": {"values": rows}, "encoding": {"y": y}, "layer": layer}


def curves(x: str, y: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A chart of lines, both scales logarithmic: rows of name, x and y."""
    scale = {"type": "quantitative", "scale": {"type": "log", "nice": False, "padding": 10}, "axis": {"tickCount": 5}}
    encoding = {
        "x": scale | {"field": "x", "title": x},
        "y": scale | {"field": "y", "title": y},
        "color": {"field": "name", "title": None, "sort": None, "legend": {"labelLimit": 400}},
    }
    mark = {"type": "line", "point": True}
    return {"width": 320, "height": 240, "data": {"values": rows}, "mark": mark, "encoding": encoding}


def keep(name: str, result: dict[str, Any]) -> None:
    """Write the numbers of a measurement, as JSON."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def render(sections: dict[str, ModuleType]) -> tuple[str, dict[str, dict[str, Any]]]:
    """The page of all recorded numbers, and its charts by the names of their files. Same numbers, same page."""
    page, charts = HEAD, {}
    for name, module in sections.items():
        if not (path := RESULTS / f"{name}.json").exists():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        facts = ", ".join(f"{what}: {value}" for what, value in result.get("machine", {}).items() if value)
        page += f"\n## {module.TITLE}\n" + f"\n{facts}.\n" * bool(facts)
        page += f"{SMOKE if result.get('quick') else ''}\n{module.page(result)}"
        if hasattr(module, "chart"):
            page += f"\n![{module.TITLE}]({name}.png)\n"
            charts[f"{name}.png"] = module.chart(result) | {"title": module.TITLE, "background": "white"}
    return page if page != HEAD else f"{HEAD}\nNothing has been measured yet.\n", charts


def write(sections: dict[str, ModuleType]) -> None:
    """Write the page and its plots."""
    page, charts = render(sections)
    (RESULTS / "README.md").write_text(page, encoding="utf-8")
    for name, chart in charts.items():
        picture = Image.open(BytesIO(vl_convert.vegalite_to_png(json.dumps(chart), scale=1.5)))
        picture.convert("RGB").quantize(64).save(RESULTS / name, optimize=True)  # a fifth of the bytes
