"""The rules of the code: imports go down the floors, the core knows only torch and NumPy, no function is long."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From the ground up. A module imports from its own room and from the floors below; `core` stands beside the house.
FLOORS = (
    ("errors",),
    ("config",),
    ("diffusers_json", "files"),
    ("pictures",),
    ("runtime",),
    ("data", "model_folder"),
    ("data.prepare", "sampling"),
    ("evaluation", "training"),  # both draw samples
    ("stages",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# The schema refuses a schedule that floats cannot hold, with the arithmetic of the core that needs no torch
CORE_FOR_CONFIG = "ddpm.core.schedules"

FILES = sorted(path.relative_to(ROOT).as_posix() for room in ("ddpm", "stages") for path in (ROOT / room).rglob("*.py"))


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports_of(path: str, text: str | None = None) -> Iterator[str]:
    """Every module that a file imports, at its top, in a function or for types only: a room that knows another
    room's types knows that room."""
    for node in ast.walk(ast.parse((ROOT / path).read_text() if text is None else text)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names = [f"{node.module}.{name.name}" for name in node.names]
            modules = [name for name in names if is_module(name)]
            yield from modules
            if len(modules) < len(names):
                yield str(node.module)


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def room_of(module: str) -> str:
    """The longest name in FLOORS that the module belongs to, or `core`."""
    name = module.removeprefix("ddpm.")
    rooms = [room for room in (*FLOOR, "core") if name == room or name.startswith(f"{room}.")]
    assert rooms, f"{module}: belongs to no room: give it a floor"
    return max(rooms, key=len)


def faults_of(path: str, text: str | None = None) -> list[tuple[str, str]]:
    """The imports of a file that break the rule."""
    room, faults = room_of(module_of(path)), []
    for imported in imports_of(path, text):
        ours = imported.split(".")[0] in ("ddpm", "stages")
        if room == "core":
            allowed = sys.stdlib_module_names | {"torch", "numpy"}
            fine = room_of(imported) == "core" if ours else imported.split(".")[0] in allowed
        elif not ours:
            continue
        elif room_of(imported) == "core":
            fine = room != "runtime" and (room != "config" or imported == CORE_FOR_CONFIG)
        else:
            fine = room_of(imported) == room or FLOOR[room_of(imported)] < FLOOR[room]
        if not fine:
            faults.append((path, imported))
    return faults


@pytest.mark.parametrize("path", [path for path in FILES if path != "ddpm/__init__.py"])
def test_imports_go_down_the_floors(path):
    assert faults_of(path) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("ddpm/core/bound.py", "import ddpm.runtime.resume"),
        ("ddpm/core/bound.py", "def f():\n    from ddpm.errors import UserError"),
        ("ddpm/core/bound.py", "from tqdm import tqdm"),
        ("ddpm/core/bound.py", "from ddpm import pictures"),
        ("ddpm/runtime/stage.py", "from ddpm.core import seeding"),
        ("ddpm/runtime/stage.py", "from ddpm.data.prepared import Prepared"),
        ("ddpm/files.py", "from ddpm.runtime.stage import root"),
        ("ddpm/pictures.py", "from ddpm.runtime import stage"),
        ("ddpm/config/schema.py", "from ddpm.core.diffusion import Schedule"),
        ("ddpm/config/schema.py", "if TYPE_CHECKING:\n    from ddpm.data.batches import Info"),
        ("ddpm/errors.py", "from ddpm.config import schema"),
        ("ddpm/data/batches.py", "from ddpm.data.prepare import prepare"),
        ("ddpm/data/batches.py", "from ddpm import model_folder"),
        ("ddpm/model_folder.py", "from ddpm.data import batches"),
        ("ddpm/diffusers_json.py", "from ddpm.files import write_file"),
        ("ddpm/sampling.py", "from ddpm.data.prepare import prepare"),
        ("ddpm/training/loop.py", "from ddpm.evaluation import distances"),
        ("ddpm/sampling.py", "from ddpm.evaluation import features"),
        ("ddpm/sampling.py", "from stages import sample"),
    ],
)
def test_an_import_that_breaks_the_rule_is_found(path, text):
    assert len(faults_of(path, text)) == 1


def test_a_module_without_a_floor_is_found():
    with pytest.raises(AssertionError, match="belongs to no room"):
        faults_of("ddpm/errors.py", "import ddpm.utilities")


@pytest.mark.process
def test_the_samplers_load_without_the_libraries_of_the_pipeline():
    code = (
        "import sys, torch; theirs = set(sys.modules); "  # torch itself imports tqdm
        "from ddpm.core.samplers import ddim; ours = set(sys.modules) - theirs; "
        "print([m for m in ('pydantic', 'omegaconf', 'yaml', 'tqdm', 'psutil', 'wandb') if m in ours])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "[]\n"


@pytest.mark.process
def test_the_core_works_where_it_is_copied_alone(tmp_path):
    for path in (ROOT / "ddpm/core").glob("*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    names = sorted(path.stem for path in Path(tmp_path, "ddpm/core").glob("[a-z]*.py"))
    code = f"import sys; sys.path.insert(0, '.'); from ddpm.core import {', '.join(names)}; print(unet.__file__)"
    options = {"cwd": tmp_path, "check": True, "stdout": subprocess.PIPE, "text": True}
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.stdout.strip() == str(tmp_path / "ddpm/core/unet.py")


STAGE_LINES, FUNCTION_LINES, ARGUMENTS = 40, 60, 7
CODE = sorted(path for room in ("ddpm", "stages", "tools", "benchmarks") for path in (ROOT / room).rglob("*.py"))


def functions_of(path: Path) -> Iterator[tuple[str, int, int]]:
    """The name, the lines and the arguments (`self` and `cls` excluded) of every function and method in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments = [argument for argument in given if argument.arg not in ("self", "cls")]
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1, len(arguments)


def test_a_stage_is_at_most_40_lines():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "stages").glob("*.py")}
    assert {name: length for name, length in lengths.items() if length > STAGE_LINES} == {}


@pytest.mark.parametrize("path", CODE, ids=[path.relative_to(ROOT).as_posix() for path in CODE])
def test_no_function_is_long_or_takes_many_arguments(path):
    functions = list(functions_of(path))
    assert [name for name, lines, _ in functions if lines > FUNCTION_LINES] == []
    assert [name for name, _, count in functions if count > ARGUMENTS and not name.startswith("_")] == []


def test_no_test_module_imports_another():
    """Code that several test modules share is in tests/support/, or in a conftest.py."""
    shared = re.compile(r"^\s*(?:from|import) tests\.(?:\w+\.)*test_\w+", re.MULTILINE)
    tests = sorted((ROOT / "tests").rglob("*.py"))
    assert [str(path) for path in tests if shared.search(path.read_text(encoding="utf-8"))] == []
