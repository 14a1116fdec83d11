"""House rules that a machine can check: which layer imports which, and how long things may be."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/vlm2vec"
LAYERS = [
    {"errors"},
    {"media", "cache", "progress"},
    {"types", "losses", "quantize"},
    {"data", "models", "retrieval"},
    {"training", "evaluation", "jobs"},
    {"demo", "monitor", "distributed", "serving"},
    {"cli"},
]
MAX_FUNCTION_LINES, MAX_FILE_LINES = 80, 500


def python_files() -> list[Path]:
    folders = ("src", "pretraining", "tests", "benchmarks", "examples")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def layer_of(module: str) -> int:
    return next(level for level, names in enumerate(LAYERS) if module in names)


def imported_modules(path: Path) -> set[str]:
    """Top-level parts of the package that a file imports, at run time or for types."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vlm2vec."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "vlm2vec":
            found |= {alias.name for alias in node.names if (PACKAGE / f"{alias.name}.py").exists()}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("vlm2vec.")}
    return found


def wrong_imports(module: str, imported: set[str]) -> set[str]:
    """What a module may not import: a higher layer, or a sibling of its own."""
    own = layer_of(module)
    allowed_siblings = {name for names in LAYERS[1:3] for name in names} if own < 3 else set()
    return {
        name
        for name in imported
        if name != module and (layer_of(name) > own or (layer_of(name) == own and name not in allowed_siblings))
    }


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if module != "__init__":
        assert not wrong_imports(module, imported_modules(path))


def test_the_import_check_knows_a_wrong_import() -> None:
    assert wrong_imports("data", {"models"}) == {"models"}
    assert wrong_imports("types", {"cli", "media"}) == {"cli"}
    assert not wrong_imports("training", {"data", "models", "losses"})


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_and_no_file_is_too_long(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


def children_seconds() -> float:
    """Processor time of finished child processes: unlike the wall clock it does not count a busy machine's waiting."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_answers_at_once_and_without_torch() -> None:
    check = "import sys; from vlm2vec.cli import app; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", check], check=True)
    command = [sys.executable, "-m", "vlm2vec.cli", "--help"]
    subprocess.run(command, check=True, capture_output=True)  # once, so that the files are in memory
    times = []
    for _ in range(3):
        since = children_seconds()
        subprocess.run(command, check=True, capture_output=True)
        times.append(children_seconds() - since)
    assert min(times) < 1.0  # about 0.4 s; the margin is for a slower processor
