"""The wheel installed outside of a clone: recipes, data files and commands are in the package."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from vlm2vec import __version__
from vlm2vec.training.recipes import shipped_recipes

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `vlm2vec` program of an environment that has the wheel, and the dependencies of the running one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-q", wheel]
    subprocess.run(install, check=True, capture_output=True)
    # A path file inside the borrowed folder is not followed, so the clone's own editable installation stays out.
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (own / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
    return folder / "bin/vlm2vec"


def run(program: Path, folder: Path, *arguments: str) -> str:
    """What a program prints in a folder outside the clone, with the clone out of its search path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [program, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_wheel_has_recipes_data_files_and_the_type_marker(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"vlm2vec/recipes/{name}.yaml" for name in shipped_recipes()} <= names
    wanted = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src/vlm2vec").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted <= names
    assert not [name for name in names if name.startswith(("pretraining/", "tests/"))]


def test_wheel_and_sdist_pass_twine_check(wheel: Path) -> None:
    pytest.importorskip("twine")
    files = [path for path in wheel.parent.iterdir() if path.suffix in (".gz", ".whl")]
    assert len(files) == 2
    command = [sys.executable, "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_installed_program_finds_its_recipes_and_trains_in_small(installed: Path, tmp_path: Path) -> None:
    assert run(installed, tmp_path, "--version").strip() == f"vlm2vec {__version__}"
    assert [line.split()[0] for line in run(installed, tmp_path, "recipes").splitlines()] == list(shipped_recipes())
    assert "Usage" in run(installed, tmp_path, "demo", "--help")
    done = run(installed, tmp_path, "train", "vlm2vec-v2-qwen2vl", "--dry-run", "train.bf16=false")
    assert "Dry run: losses" in done
    where = run(installed.with_name("python"), tmp_path, "-c", "import vlm2vec; print(vlm2vec.__file__)")
    assert where.startswith(str(installed.parents[1]))
