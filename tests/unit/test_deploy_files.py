"""The templates in examples/deploy are well-formed, agree with each other, and name only what the code has."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from celery.bin.celery import celery as celery_commands

from rhesis_tasks.cli import commands

# Not among the oldest versions of what we depend on, with which this need not run.
yaml = pytest.importorskip("yaml")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "examples" / "deploy"
FILES = [path for path in sorted(DEPLOY.rglob("*")) if path.is_file()]
SCRIPTS = [path for path in FILES if path.suffix == ".sh"]
UNITS = [path for path in FILES if path.suffix == ".service"]
MANIFESTS = [
    document
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
    if document
]
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if name != "postgres"}
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
STOP_SECONDS = 90  # more than a worker takes to stop


def named(path: Path) -> str:
    return str(path.relative_to(DEPLOY))


def pods() -> dict[str, dict[str, Any]]:
    """The pods of all manifests, by what they run."""
    found = {each["metadata"]["labels"]["component"]: each["spec"] for each in MANIFESTS if "template" in each["spec"]}
    return {name: spec["template"]["spec"] for name, spec in found.items()}


def unit(name: str) -> list[tuple[str, str]]:
    lines = (DEPLOY / "systemd" / name).read_text().splitlines()
    return [(key, value) for key, _, value in (line.partition("=") for line in lines if line and line[0] not in "#[")]


# --- linted --------------------------------------------------------------------------------------------------------


def ran(*command: str) -> str:
    """What a linter says."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / command[0]), *command[1:]], capture_output=True, text=True, timeout=60
    )
    return done.stdout + done.stderr + (f"exit code {done.returncode}" if done.returncode else "")


def test_the_dockerfile_has_nothing_that_hadolint_warns_of() -> None:
    assert ran("hadolint", str(DEPLOY / "Dockerfile")) == ""


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_a_script_has_nothing_that_shellcheck_warns_of(script: Path) -> None:
    assert ran("shellcheck", "--enable=all", "--exclude=SC2250", str(script)) == ""
    assert script.stat().st_mode & 0o111 == 0o111


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda each: f"{each['kind']} {each['metadata']['name']}")
def test_a_manifest_is_as_kubernetes_wants_it(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


# --- who may do what -----------------------------------------------------------------------------------------------


def last_stage() -> str:
    return DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]


def test_the_image_runs_as_a_numbered_user_and_has_no_tools_to_build_with() -> None:
    user = re.findall(r"^USER (\S+)$", last_stage(), re.MULTILINE)

    assert user == ["10001:10001"]
    assert not re.search(r"apt|pip|gcc|build-essential|curl", last_stage())
    assert "uninstall --quiet --yes pip" in DOCKERFILE


def test_the_build_context_has_only_what_is_copied() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    }

    assert next(line for line in ignored if line and line[0] != "#") == "*"
    assert {re.sub(r"/[^/]+\.sh$", "/*.sh", source) for source in copied} == allowed
    assert all((ROOT / source).exists() for source in copied)


@pytest.mark.parametrize("name", sorted(pods()))
def test_a_pod_is_nobody_special_and_has_bounds(name: str) -> None:
    pod = pods()[name]
    [container] = pod["containers"]

    assert (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"]) == (True, 10001)
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert set(container["resources"]["requests"]) == {"cpu", "memory"}
    assert "memory" in container["resources"]["limits"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("name", sorted(OURS))
def test_a_service_of_ours_is_read_only_and_has_no_capabilities(name: str) -> None:
    service = OURS[name]

    assert (service["read_only"], service["cap_drop"], service["init"]) == (True, ["ALL"], True)
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service


def test_only_the_api_is_published_and_on_loopback_only() -> None:
    assert {name: service["ports"] for name, service in SERVICES.items() if "ports" in service} == {
        "api": ["127.0.0.1:8000:8000"]
    }
    assert COMPOSE["networks"]["database"] == {"internal": True}
    assert SERVICES["postgres"]["networks"] == ["database"]
    assert [each["metadata"]["name"] for each in MANIFESTS if each["kind"] == "Service"] == ["example-api"]


def test_the_owners_login_is_for_the_migration_alone() -> None:
    with_it = {name for name, service in OURS.items() if "OWNER_PASSWORD" in str(service.get("environment"))}
    pods_with_it = {name for name, pod in pods().items() if "example-owner" in str(pod)}

    assert with_it == pods_with_it == {"migrate"}


def test_no_file_has_a_password() -> None:
    for path in (DEPLOY / "env.example", DEPLOY / "systemd" / "worker.env.example"):
        for name, _, value in (line.partition("=") for line in path.read_text().splitlines() if line[:1] not in "#"):
            assert not value or name in {"LOG_FORMAT", "CELERY_WORKER_CONCURRENCY", "HEALTH_ADDRESS", "HEALTH_PORT"}
    for path in FILES:
        for password in re.findall(r"postgresql://\w+:([^@]+)@", path.read_text()):
            assert password.startswith("${") and ":?" in password, named(path)
    assert not [each for each in MANIFESTS if each["kind"] == "Secret"]


def test_each_variable_that_compose_needs_is_in_the_example_of_its_file_and_has_no_default() -> None:
    asked = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text()))
    given = set(re.findall(r"^(\w+)=", (DEPLOY / "env.example").read_text(), re.MULTILINE))

    assert asked == given
    assert len(re.findall(r"\$\{\w+:\?", (DEPLOY / "compose.yaml").read_text())) == len(
        re.findall(r"\$\{", (DEPLOY / "compose.yaml").read_text())
    )


# --- agreement with the code ---------------------------------------------------------------------------------------

# Of Celery, Python, PostgreSQL's image and the scripts themselves.
OTHERS = {"PATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "POSTGRES_USER", "POSTGRES_PASSWORD"}
OWN = {"OWNER_PASSWORD", "APP_PASSWORD", "CELERY_APP", "MIGRATION_DATABASE_URL", "APP_ROLE"}


def environment_names() -> Iterator[str]:
    for service in SERVICES.values():
        yield from service.get("environment", {})
    for pod in pods().values():
        yield from (variable["name"] for container in pod["containers"] for variable in container["env"])
    for path in UNITS:
        for key, value in unit(path.name):
            if key == "Environment":
                yield from (each.partition("=")[0] for each in shlex.split(value))
    for path in (DEPLOY / "systemd").glob("*.example"):
        yield from re.findall(r"^(\w+)=", path.read_text(), re.MULTILINE)
    for path in SCRIPTS:
        yield from re.findall(r"\$\{?([A-Z_]+)", path.read_text())


def test_each_environment_variable_of_a_template_is_read_by_somebody() -> None:
    code = "".join(
        path.read_text()
        for folder in ("rhesis_tasks", "examples/fastapi_app")
        for path in (ROOT / folder).rglob("*.py")
    )
    unknown = {name for name in environment_names() if not re.search(rf"\b{name}\b", code)} - OTHERS - OWN
    if "worker" not in commands.commands:  # what reads these
        unknown = {name for name in unknown if not re.match("CELERY_WORKER_|HEALTH_|LOG_FORMAT$", name)}
    if "flower" not in commands.commands:
        unknown = {name for name in unknown if not name.startswith("FLOWER_")}

    assert unknown == set()


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """What each template starts, and where that is said."""
    for name, service in OURS.items():
        if "command" in service:
            yield f"compose {name}", [str(each) for each in service["command"]]
    for name, pod in pods().items():
        yield f"kubernetes {name}", [str(each) for each in pod["containers"][0]["command"]]
    for path in UNITS:
        [line] = [value for key, value in unit(path.name) if key == "ExecStart"]
        yield path.name, [Path(word).name if number == 0 else word for number, word in enumerate(shlex.split(line))]
    for path in SCRIPTS:
        for line in re.findall(r"exec (rhesis-tasks .*)$", path.read_text(), re.MULTILINE):
            words = shlex.split(line.replace('"$@"', "").replace("${CELERY_APP:-app.worker}", "app.worker"))
            yield path.name, words
    for line in re.findall(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE):
        yield "Dockerfile", yaml.safe_load(line)


COMMANDS = dict(command_lines())


@pytest.mark.parametrize("where", sorted(COMMANDS))
def test_a_command_of_a_template_is_one(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://somebody@localhost/example")
    program, *arguments = COMMANDS[where]

    if program == "rhesis-tasks":
        if arguments[0] in {"worker", "flower"} and arguments[0] not in commands.commands:
            return  # not in this version
        parsed(commands, arguments)
    elif program == "celery":
        assert arguments[:2] == ["-A", "app.worker"]
        parsed(celery_commands.commands["beat"], arguments[arguments.index("beat") + 1 :])
    elif program == "uvicorn":
        uvicorn = pytest.importorskip("uvicorn.main")
        parsed(uvicorn.main, arguments)
    else:
        assert (DEPLOY / program) in SCRIPTS


def parsed(command: click.Command, arguments: list[str]) -> None:
    """Raises what the command line is wrong in, and runs nothing."""
    while isinstance(command, click.Group):
        name, command_, arguments = command.resolve_command(click.Context(command), arguments)
        assert name and command_
        command = command_
    if command.name == "beat":  # of Celery's, which would look for its application
        click.Command("beat", params=command.params, callback=None).make_parser(click.Context(command)).parse_args(
            list(arguments)
        )
        return
    command.make_context(command.name, list(arguments))


def test_the_ports_that_are_probed_are_those_that_are_listened_on() -> None:
    for name, pod in pods().items():
        [container] = pod["containers"]
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", ())}
        probes = [container[probe]["httpGet"] for probe in container if probe.endswith("Probe")]
        said = {each["name"]: each.get("value") for each in container["env"]}
        assert {probe["port"] for probe in probes} == set(ports), name
        if name == "worker":
            assert (said["HEALTH_PORT"], said["HEALTH_ADDRESS"]) == (str(ports["health"]), "0.0.0.0")  # noqa: S104
            assert {probe["path"] for probe in probes} == {"/livez", "/readyz"}
            assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
        if name == "api":
            assert container["command"][-1] == str(ports["http"])
    for name, variable in (("worker", "HEALTH_PORT"), ("flower", "FLOWER_PORT")):
        assert f"127.0.0.1:{SERVICES[name]['environment'][variable]}/" in SERVICES[name]["healthcheck"]["test"][-1]
    api = SERVICES["api"]
    assert "127.0.0.1:8000/health" in api["healthcheck"]["test"][-1]
    assert '"8000"' in DOCKERFILE and "EXPOSE 8000" in DOCKERFILE


def test_a_worker_has_the_same_time_to_stop_everywhere() -> None:
    assert pods()["worker"]["terminationGracePeriodSeconds"] == STOP_SECONDS
    assert SERVICES["worker"]["stop_grace_period"] == f"{STOP_SECONDS}s"
    assert ("TimeoutStopSec", str(STOP_SECONDS)) in unit("example-worker@.service")
    assert ("KillMode", "mixed") in unit("example-worker@.service")


def test_all_that_needs_the_tables_waits_for_the_migration() -> None:
    for name in set(OURS) - {"migrate"}:
        assert OURS[name]["depends_on"] == {"migrate": {"condition": "service_completed_successfully"}}
    assert OURS["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}


def test_the_units_are_shut_in_in_the_same_way() -> None:
    def sandbox(name: str) -> list[tuple[str, str]]:
        settings = unit(name)
        return settings[settings.index(("NoNewPrivileges", "yes")) :]

    assert sandbox("example-worker@.service") == sandbox("example-beat.service")
