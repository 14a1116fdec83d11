"""The files in deploy/jobs pass their linters, use options that exist, and their documented costs are the plan's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from vlm2vec.cli import app
from vlm2vec.planning.cost import GIB
from vlm2vec.planning.geometry import geometry_of
from vlm2vec.planning.plan import chunk_tokens_for, gpu_of, plan_training
from vlm2vec.training.chunks import training_of
from vlm2vec.training.config import load_recipe
from vlm2vec.training.recipes import find_recipe, shipped_recipes
from vlm2vec.training.sample import sample_inputs

ROOT = Path(__file__).parents[1]
JOBS = ROOT / "deploy/jobs"
SKY: dict[str, Any] = yaml.safe_load((JOBS / "train.sky.yaml").read_text())
RECIPES = ("vlm2vec-phi35v", "vlm2vec-llava16", "vlm2vec-v2-qwen2vl")
BIN = Path(sys.executable).parent
# The keys of a SkyPilot task: https://docs.skypilot.co/en/latest/reference/yaml-spec.html
SKY_KEYS = {"name", "envs", "resources", "file_mounts", "setup", "run", "num_nodes", "workdir", "secrets", "volumes"}
SKY_RESOURCES = {"accelerators", "use_spot", "disk_size", "job_recovery", "infra", "cpus", "memory", "any_of"}


def scripts() -> dict[str, str]:
    """Every shell script: the files, and those inside of a file."""
    inside = re.search(r"^script='(.*?)'$", (JOBS / "train_hf.sh").read_text(), re.DOTALL | re.MULTILINE)
    assert inside
    return {
        "slurm": (JOBS / "train.slurm").read_text(),
        "hf": (JOBS / "train_hf.sh").read_text(),
        "hf, inside the job": inside.group(1),
        "sky, setup": SKY["setup"],
        "sky, run": SKY["run"],
    }


@pytest.mark.parametrize("name", scripts())
def test_a_script_passes_bash_and_shellcheck(name: str) -> None:
    for command in (["bash", "-n"], [str(BIN / "shellcheck"), "--shell=bash", "--exclude=SC1090,SC1091", "-"]):
        text = scripts()[name]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["slurm", "hf, inside the job", "sky, run"])
def test_a_script_trains_resumes_and_verifies_with_commands_that_exist(name: str) -> None:
    text = scripts()[name]
    commands: Any = typer.main.get_command(app)
    for command in re.findall(r"vlm2vec(?:\.cli)? (train|verify|push|eval|index)\b", text):
        assert command in commands.commands
    assert "--resume" in {option for each in commands.commands["train"].params for option in each.opts}
    assert re.search(r"torchrun --standalone --nproc-per-node \S+ -m vlm2vec\.cli train", text)
    assert "checkpoints/*" in text and "--resume" in text and "vlm2vec verify" in text


def test_the_recipes_that_the_files_name_are_shipped() -> None:
    for file in JOBS.iterdir():
        named = set(re.findall(r"\bvlm2vec-(?:phi|llava|v2)[\w-]*", file.read_text()))
        assert named == set(RECIPES) <= set(shipped_recipes()), file


def test_the_slurm_job_asks_for_what_the_script_uses() -> None:
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", scripts()["slurm"], re.MULTILINE))
    assert asked["nodes"] == asked["ntasks-per-node"] == "1"  # torchrun starts the processes
    assert asked["gpus-per-node"] == "8" and "requeue" in asked and asked["open-mode"] == "append"
    first = scripts()["slurm"].splitlines()
    last_option = max(i for i, line in enumerate(first) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in first[:last_option])  # Slurm ignores options after the first command


def test_the_sky_task_has_known_keys_and_defines_its_variables() -> None:
    assert set(SKY) <= SKY_KEYS and set(SKY["resources"]) <= SKY_RESOURCES
    used = set(re.findall(r"\$\{?([A-Z][A-Z_]+)\}?", SKY["run"] + SKY["setup"] + str(SKY["file_mounts"])))
    assert used - {name for name in used if name.startswith("SKYPILOT_")} == set(SKY["envs"])
    assert set(SKY["resources"]["accelerators"].values()) == {8}


def test_the_hub_job_is_accepted_by_the_hub_client(tmp_path: Path) -> None:
    """`hf jobs run` parses every option; a fake `hf` in front of the path hands them to its parser only."""
    from huggingface_hub.cli.hf import app as hf

    recorder = tmp_path / "hf"
    recorder.write_text('#!/bin/sh\nprintf "%s\\0" "$@" > "$RECORD"\n')
    recorder.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(tmp_path / "words")}
    command = ["bash", str(JOBS / "train_hf.sh"), "vlm2vec-llava16", "me/model", "--dry-run"]
    subprocess.run(command, env=env, check=True)
    words = (tmp_path / "words").read_text().split("\0")[:-1]
    group: Any = hf
    with group.make_context("hf", words[:2]) as context:
        jobs: Any = group.get_command(context, "jobs")
        given = jobs.get_command(context, "run").make_context("run", words[2:], parent=context).params
    assert words[:2] == ["jobs", "run"] and given["dry_run"] and given["detach"]
    assert list(given["command"])[:2] == ["bash", "-c"] and given["image"] == "python:3.11-bookworm"
    assert "RECIPE=vlm2vec-llava16" in given["env"] and list(given["secrets"]) == ["HF_TOKEN"]


@pytest.mark.parametrize("name", RECIPES)
def test_the_costs_on_the_page_are_those_of_the_plan(name: str) -> None:
    recipe = load_recipe(find_recipe(name), [])
    inputs, gpu = sample_inputs(recipe)[0], gpu_of("h100")
    model = geometry_of(recipe.model.base, recipe.model.options)
    tokens = chunk_tokens_for(model, training_of(recipe), inputs, gpu.memory_gib, 8)
    made = plan_training(model, training_of(recipe, tokens), inputs, gpu, 8, 0.4)
    row = (
        f"| {name} | {recipe.train.steps:,} | {made.hours:.1f} | {8 * made.hours:.1f} | {made.memory.total / GIB:.1f} |"
    )
    assert row in (ROOT / "docs/guides/jobs.md").read_text()
