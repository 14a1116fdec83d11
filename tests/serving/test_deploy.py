"""The files in deploy/ pass their linters, and the flags and paths that they use exist."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml
from dockerfile_parse import DockerfileParser

from vlm2vec.cli import app
from vlm2vec.serving.app import create_app
from vlm2vec.serving.settings import ServeSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PATHS: set[str] = set(create_app(None, ServeSettings(model="compact")).openapi()["paths"])  # type: ignore[arg-type]
PORT = ServeSettings(model="compact").port
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
DEPLOYMENT, SERVICE = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())


def parsed(words: list[str]) -> dict[str, Any]:
    """Parse a command with the command line, which refuses unknown options."""
    assert words[0] == "vlm2vec"
    group: Any = typer.main.get_command(app)
    command = group.commands[words[1]]
    return dict(command.make_context(words[1], words[2:]).params)


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage of the Dockerfile, including those of its base stage."""
    parser = DockerfileParser(fileobj=io.BytesIO((DEPLOY / "Dockerfile").read_bytes()), env_replace=False)
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in parser.structure:
        if line["instruction"] == "FROM":
            base, _, name = line["value"].partition(" AS ")
            found[name] = list(found.get(base, [("FROM", base)]))
        elif line["instruction"] != "COMMENT":
            found[name].append((line["instruction"], line["value"]))
    return found


def last(stage: str, instruction: str) -> str:
    return next(value for name, value in reversed(stages()[stage]) if name == instruction)


def test_the_dockerfile_passes_its_linter() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_image_runs_as_an_unprivileged_user_with_a_health_check(target: str) -> None:
    assert last(target, "USER") == "10001:10001"
    entry, command = (yaml.safe_load(last(target, name)) for name in ("ENTRYPOINT", "CMD"))
    settings = parsed([*entry, *command])
    assert settings["host"] == "0.0.0.0" and settings["port"] == PORT and last(target, "EXPOSE") == str(PORT)
    check = re.search(rf"http://127\.0\.0\.1:{PORT}(/[\w/]+)", last(target, "HEALTHCHECK"))
    assert check and check.group(1) in PATHS
    installs = " ".join(value for name, value in stages()[target] if name == "RUN")
    extras = set(re.search(r'"\.\[([\w,]+)\]"', installs).group(1).split(","))  # type: ignore[union-attr]
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "serve" in extras and extras <= set(known)
    assert ("https://download.pytorch.org/whl/cpu" in installs) == (target == "cpu")
    pinned = re.findall(r"torch==([\d.]+)(\+cpu)?", installs)
    assert f"torch=={pinned[0][0]}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert bool(pinned[0][1]) == (target == "cpu")


def test_files_that_the_image_copies_exist_and_are_not_ignored() -> None:
    copied = [
        name for kind, value in stages()["base"] if kind == "COPY" for name in value.split()[:-1] if name[:2] != "--"
    ]
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert copied and "*" in ignored
    for name in copied:
        assert (ROOT / name).exists() and f"!{name}" in ignored, name


def service_words(name: str) -> list[str]:
    service = COMPOSE["services"][name]
    entry = service.get("entrypoint") or yaml.safe_load(last("cpu", "ENTRYPOINT"))
    return [*entry, *service["command"]]


def test_compose_indexes_into_qdrant_and_serves_from_it() -> None:
    index, served = parsed(service_words("index")), parsed(service_words("server"))
    assert index["store"] == served["store"] == "qdrant://qdrant:6333/photos"
    assert index["first"] == served["model"]
    services, media = COMPOSE["services"], {"../photos:/media:ro"}
    assert str(index["second"]) == str(served["media_root"]) == "/media"
    assert media < set(services["index"]["volumes"]) and media < set(services["server"]["volumes"])
    assert services["server"]["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]
    assert [f"/run/secrets/{name}" for name in services["server"]["secrets"]] == [str(served["api_key_file"])]
    assert set(services["server"]["secrets"]) == set(COMPOSE["secrets"])
    assert services["server"]["depends_on"] == {"index": {"condition": "service_completed_successfully"}}
    assert services["index"]["depends_on"] == {"qdrant": {"condition": "service_healthy"}}
    for name in ("index", "server"):
        build = services[name]["build"]
        assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")
        assert build["target"] in stages() and services[name]["read_only"] and services[name]["cap_drop"] == ["ALL"]
        volumes = {volume.partition(":")[0] for volume in services[name]["volumes"] if volume[0] != "."}
        assert volumes <= set(COMPOSE["volumes"])
    assert int(services["server"]["stop_grace_period"].rstrip("s")) > ServeSettings(model="compact").drain


def test_kubernetes_accepts_the_resources() -> None:
    for resource in (DEPLOYMENT, SERVICE):
        kubernetes_validate.validate(resource, "1.33", strict=True)


def test_kubernetes_probes_use_paths_of_the_application() -> None:
    pod = DEPLOYMENT["spec"]["template"]["spec"]
    container = pod["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": PORT} and SERVICE["spec"]["ports"][0]["targetPort"] == "http"
    for probe, path in (("startup", "ready"), ("readiness", "ready"), ("liveness", "live")):
        asked = container[f"{probe}Probe"]["httpGet"]
        assert asked == {"path": f"/health/{path}", "port": "http"} and asked["path"] in PATHS
    served = parsed([*yaml.safe_load(last("cpu", "ENTRYPOINT")), *container["args"]])
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert str(served["api_key_file"]).startswith(mounts["keys"] + "/")
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert SERVICE["spec"]["selector"].items() <= DEPLOYMENT["spec"]["template"]["metadata"]["labels"].items()
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > before + ServeSettings(model="compact").drain
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
    assert container["securityContext"]["readOnlyRootFilesystem"]
