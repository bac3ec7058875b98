"""docker/, where no engine is at hand: the files against the Compose specification, a linter, and their meaning."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from flows.cli.main import parse
from support.compose import DOCKER, ROOT, copied, environment_of, instructions, read

SET = {"POSTGRES_PASSWORD": "f00ba4"}
FLOWS = ("worker", "cli")
OURS = ("server", *FLOWS)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return read("compose.yaml", SET)


@pytest.mark.parametrize("path", sorted(DOCKER.glob("*.yaml")), ids=lambda path: path.name)
def test_the_specification_accepts_it(path: Path) -> None:
    services = PyCompose.from_json(json.dumps(read(path.name, SET))).to_dict()["services"]
    assert set(services) == set(yaml.safe_load(path.read_text())["services"])


def test_nothing_starts_on_a_password_that_nobody_chose() -> None:
    example = dict(re.findall(r"^(\w+)=(.*)$", (DOCKER / ".env.example").read_text(), re.MULTILINE))
    with pytest.raises(KeyError, match="set it in docker"):
        read("compose.yaml", example)
    text = (DOCKER / "compose.yaml").read_text()
    secrets = re.findall(r"\$\{(\w*(?:PASSWORD|SECRET|KEY)\w*)(:.)?", text)
    assert secrets
    assert all(how == ":?" for _, how in secrets)
    ignored = subprocess.run(
        ["git", "check-ignore", "docker/.env", "docker/.env.example"], cwd=ROOT, text=True, capture_output=True
    )
    if ignored.returncode != 128:  # in a checkout
        assert ignored.stdout.split() == ["docker/.env"]


def test_the_example_names_what_the_file_asks_for() -> None:
    example = set(re.findall(r"^#?(\w+)=", (DOCKER / ".env.example").read_text(), re.MULTILINE))
    text = (DOCKER / "compose.yaml").read_text()
    asked = set(re.findall(r"\$\{(\w+)", text)) | set(
        re.findall(r"^  (\w+):$", text.split("services:")[0], re.MULTILINE)
    )
    assert example == asked - {"build"}


def test_who_waits_for_whom(compose: dict[str, Any]) -> None:
    services = compose["services"]
    waits = {
        name: {on: how["condition"] for on, how in service.get("depends_on", {}).items()}
        for name, service in services.items()
    }
    assert waits == {
        "postgres": {},
        "server": {"postgres": "service_healthy"},
        "worker": {"server": "service_healthy"},
        "cli": {"server": "service_healthy"},
    }
    assert services["postgres"]["healthcheck"]["test"][1] == "pg_isready"
    assert services["server"]["healthcheck"]["test"][-1].count("http://127.0.0.1:4200/api/health") == 1
    assert int(services["server"]["healthcheck"]["start_period"].removesuffix("s")) >= 90
    assert {"--with-healthcheck", "--in-containers"} <= {*services["worker"]["command"]}
    port = services["worker"]["environment"]["PREFECT_WORKER_WEBSERVER_PORT"]
    assert f"http://127.0.0.1:{port}/health" in services["worker"]["healthcheck"]["test"][-1]
    assert {name: service["restart"] for name, service in services.items()} == dict.fromkeys(
        ("postgres", "server", "worker"), "unless-stopped"
    ) | {"cli": "no"}


def test_one_image_one_path_one_server(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert {services[name]["image"] for name in OURS} == {"stackwise:0.1.0-cpu"}
    cuda = read("compose.yaml", SET | {"STACKWISE_VARIANT": "cuda"})["services"]
    assert {(cuda[name]["image"], cuda[name]["build"]["args"]["VARIANT"]) for name in OURS} == {
        ("stackwise:0.1.0-cuda", "cuda")
    }
    assert {tuple(services[name]["volumes"]) for name in FLOWS} == {("data:/data",)}
    (deployed,) = [
        each["parameters"]["artifacts"]
        for each in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
        if each["name"] == "docker"
    ]
    assert deployed == f"{services['cli']['working_dir']}/artifacts" == "/data/artifacts"
    for name in OURS:
        environment = environment_of(services[name], SET)
        assert environment["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] == "false"
        assert environment.get("PREFECT_API_URL") == (None if name == "server" else "http://server:4200/api")
    url = services["server"]["environment"]["PREFECT_SERVER_DATABASE_CONNECTION_URL"]
    postgres = services["postgres"]["environment"]
    assert url == (f"postgresql+asyncpg://{postgres['POSTGRES_USER']}:f00ba4@postgres:5432/{postgres['POSTGRES_DB']}")
    assert services["server"]["ports"] == ["127.0.0.1:4200:4200"]  # the server lets everybody in who reaches it


def test_the_command_line_takes_the_commands(compose: dict[str, Any]) -> None:
    for name in ("server", "worker"):
        assert parse(compose["services"][name]["command"]).command == name
    assert ("ENTRYPOINT", '["stackwise"]') in instructions()
    assert "stackwise" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def test_the_linter_finds_nothing() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, "--no-color", DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_images_are_pinned_and_nobody_is_root(compose: dict[str, Any]) -> None:
    bases = [arguments for instruction, arguments in instructions() if instruction == "FROM"]
    assert bases
    for image in [*bases, compose["services"]["postgres"]["image"]]:
        assert re.fullmatch(r"[a-z]+:\d+\.\d+(\.\d+)?-[a-z-]+", image), image
    assert [arguments for instruction, arguments in instructions() if instruction == "USER"][-1] == "1000"
    assert not any("sudo" in arguments for _, arguments in instructions())
    assert not list(DOCKER.rglob("__init__.py"))  # `import docker` is the engine's client, which Prefect looks for


def test_the_lock_has_a_hash_for_everything_but_torch() -> None:
    """Of the versions of constraints.txt; CPU builds of torch lie in an index that publishes their hashes itself."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    locked = {pin: hashes for pin, *hashes in (line.split() for line in lines)}
    constraints = {line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert all(
        hashes and all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", each) for each in hashes)
        for hashes in locked.values()
    )
    names = {re.split("[=<>~!;[ ]", pin)[0].replace("_", "-") for pin in locked}
    pinned = {line.partition("==")[0] for line in constraints}
    assert {pin for pin in locked if pin.partition("==")[0] in pinned} <= constraints
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {re.split(r"[=<>~!;\[ ]", each)[0] for each in needed} - names == {"torch"}


def test_what_is_copied_is_there_and_sent() -> None:
    sources = {source for several, _ in copied() for source in several}
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == sources
    assert all((ROOT / source).exists() for source in sources)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {package.split(".")[0] for package in packages} <= sources


def test_a_relative_artifacts_folder_lies_on_the_volume(compose: dict[str, Any]) -> None:
    order = [arguments for instruction, arguments in instructions() if instruction in ("WORKDIR", "RUN")]
    folder = order.index("/work")
    (link,) = [at for at, arguments in enumerate(order) if "ln --symbolic /data/artifacts artifacts" in arguments]
    assert folder < link
    assert any(volume.split(":")[1] == "/data" for volume in compose["services"]["worker"]["volumes"])


def test_both_variants_have_an_index_and_no_other_is_taken() -> None:
    (script,) = [arguments for instruction, arguments in instructions() if instruction == "RUN" and "case" in arguments]
    choice = script[: script.index("esac") + 4] + ' && echo "$index"'

    def chosen(variant: str) -> tuple[int, str]:
        done = subprocess.run(["bash", "-c", choice], env={"VARIANT": variant}, capture_output=True, text=True)
        return done.returncode, done.stdout.strip() or done.stderr.strip()

    assert chosen("cpu") == (0, "https://download.pytorch.org/whl/cpu")
    assert chosen("cuda") == (0, "https://pypi.org/simple")
    assert chosen("rocm") == (2, "VARIANT is cpu or cuda, not 'rocm'")
