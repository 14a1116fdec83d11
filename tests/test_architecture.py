"""Architecture rules: allowed imports between layers, and length limits of functions and files."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/vlm2vec"
LAYERS = [
    {"errors"},
    {"media", "cache", "progress", "files", "extras", "charts"},
    {"types", "batch", "losses", "quantize", "images"},
    {"data", "models", "planning", "retrieval"},
    {"training", "evaluation", "jobs"},
    {"catalog", "demo", "doctor", "monitor", "distributed", "serving", "integrations"},
    {"cli"},
    {"__main__"},
]
MAX_FUNCTION_LINES, MAX_FILE_LINES = 60, 350
MAX_MODELS_FILES = 12


def python_files() -> list[Path]:
    folders = ("src", "pretraining", "tests", "benchmarks", "examples")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def layer_of(module: str) -> int:
    return next(level for level, names in enumerate(LAYERS) if module in names)


def imported_files(path: Path, package: Path) -> set[Path]:
    """Files of the package that a file imports, anywhere in it: at run time, inside functions, or for types."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {file_of(alias.name, package) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                found.add(file_of(f"{node.module}.{alias.name}", package) or file_of(node.module, package))
    return {file for file in found if file is not None and file != path}


def file_of(module: str, package: Path) -> Path | None:
    """The file of a dotted name; None for another package or a name inside a module."""
    place = package.parent.joinpath(*module.split("."))
    candidates = (place.with_suffix(".py"), place / "__init__.py")
    return next((path for path in candidates if path.exists() and path.is_relative_to(package)), None)


def import_cycles(package: Path) -> list[list[Path]]:
    """Groups of files that import each other, directly or through others (Tarjan)."""
    imports = {path: imported_files(path, package) for path in sorted(package.rglob("*.py"))}
    order: dict[Path, int] = {}
    lowest: dict[Path, int] = {}
    stack: list[Path] = []
    cycles = []

    def visit(path: Path) -> None:
        order[path] = lowest[path] = len(order)
        stack.append(path)
        for other in sorted(imports[path]):
            if other not in order:
                visit(other)
                lowest[path] = min(lowest[path], lowest[other])
            elif other in stack:
                lowest[path] = min(lowest[path], order[other])
        if lowest[path] == order[path]:
            group = stack[stack.index(path) :]
            del stack[stack.index(path) :]
            if len(group) > 1:
                cycles.append(sorted(group))

    for path in imports:
        if path not in order:
            visit(path)
    return cycles


def imported_modules(path: Path) -> set[str]:
    """Top-level parts of the package that a file imports."""
    parts = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in imported_files(path, PACKAGE)}
    return parts - {"__init__"}


def wrong_imports(module: str, imported: set[str]) -> set[str]:
    """What a module may not import: a higher layer, or a sibling of its own."""
    own = layer_of(module)
    allowed_siblings = {name for names in LAYERS[1:3] for name in names} if own < 3 else set()
    return {
        name
        for name in imported
        if name != module and (layer_of(name) > own or (layer_of(name) == own and name not in allowed_siblings))
    }


def test_imports_go_one_way() -> None:
    wrong = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if module != "__init__" and (found := wrong_imports(module, imported_modules(path))):
            wrong[str(path.relative_to(PACKAGE))] = found
    assert not wrong


def test_no_files_import_each_other() -> None:
    assert not [[str(path.relative_to(PACKAGE)) for path in cycle] for cycle in import_cycles(PACKAGE)]


def test_the_checks_find_a_wrong_import_and_a_cycle(tmp_path: Path) -> None:
    assert wrong_imports("data", {"models"}) == {"models"}
    assert wrong_imports("types", {"cli", "media"}) == {"cli"}
    assert not wrong_imports("training", {"data", "models", "losses"})
    package = tmp_path / "house"
    package.mkdir()
    for name, text in {
        "a": "from house import b",
        "b": "import house.c",
        "c": "from house.a import x",
        "d": "",
    }.items():
        (package / f"{name}.py").write_text(text)
    assert [[path.stem for path in cycle] for cycle in import_cycles(package)] == [["a", "b", "c"]]


def test_no_function_and_no_file_is_too_long() -> None:
    long = []
    for path in python_files():
        text = path.read_text()
        name = str(path.relative_to(ROOT))
        long += [name] if len(text.splitlines()) > MAX_FILE_LINES else []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                long += [f"{name}: {node.name}"] if node.end_lineno - node.lineno >= MAX_FUNCTION_LINES else []
    assert not long


def test_the_top_of_models_holds_what_every_reader_needs() -> None:
    assert len(list((PACKAGE / "models").glob("*.py"))) <= MAX_MODELS_FILES


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
    for _ in range(6):
        since = children_seconds()
        subprocess.run(command, check=True, capture_output=True)
        times.append(children_seconds() - since)
    assert min(times) < 1.0  # about 0.4 s; the margin is for a slower processor, the repeats are for a busy one
