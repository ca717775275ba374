"""What deploy/ says is what the program does: settings, commands, exit codes, grace periods; and nothing runs as root.

`python tests/unit/test_deploy.py` prints deploy/relay.toml as it should be.
"""

from __future__ import annotations

import ast
import configparser
import json
import re
import shlex
import shutil
import stat
import subprocess
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from relay.errors import RelayError
from relay.inbox import load
from relay.settings import Settings, environment_name, load_settings, setting_names, walk_settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.iterdir() if path.is_file())
UNITS = [DEPLOY / "relay.service", DEPLOY / "relay-inbox@.service"]
RELAY_IMAGE = re.compile(r"(^|/)relay-outbox:")

GOODBYE_S = 10
"""After the drain the program closes its connections; a stop that does not leave it the time is a kill."""

# A value where the setting has no default; the line stays a comment until somebody knows better.
EXAMPLES = {"source": "shop", "inbox.consumer": "billing", "inbox.queue": "billing"}


# --- reading the files ---------------------------------------------------------------------------------------------


def compose_services() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    return services


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def pods() -> list[dict[str, Any]]:
    return [m["spec"]["template"]["spec"] for m in manifests() if "template" in m.get("spec", {})]


def pod_containers(pod: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def unit(path: Path) -> dict[str, dict[str, list[str]]]:
    """Section -> key -> values; a unit file may repeat a key, which configparser alone would not have."""
    sections: dict[str, dict[str, list[str]]] = {}
    current: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if not line or line.startswith(("#", ";")):
            continue
        if header := re.fullmatch(r"\[(\w+)\]", line):
            current = sections.setdefault(header[1], {})
        else:
            key, sign, value = line.partition("=")
            assert sign, f"{path.name}: {line!r} is not key=value"
            current.setdefault(key, []).append(value)
    return sections


def unit_environment(path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in unit(path)["Service"]["Environment"])


def dockerfile() -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments), continued lines joined, comments left out."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word.upper(), rest.strip())
        for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


def final_stage() -> list[tuple[str, str]]:
    instructions = dockerfile()
    last = max(at for at, (word, _) in enumerate(instructions) if word == "FROM")
    return instructions[last:]


def instruction(name: str) -> str:
    found = [rest for word, rest in final_stage() if word == name]
    assert len(found) == 1, f"{name} in the final stage: {found}"
    return found[0]


def relay_commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of relay in deploy/: (where, arguments without the program)."""
    yield "Dockerfile CMD", json.loads(instruction("CMD"))
    for name, service in compose_services().items():
        if RELAY_IMAGE.search(service["image"]):
            yield f"compose.yaml {name}", service["command"]
    for container in (container for pod in pods() for container in pod_containers(pod)):
        if RELAY_IMAGE.search(container["image"]):
            yield f"kubernetes.yaml {container['name']}", container["args"]
    for path in UNITS:
        for key, values in unit(path)["Service"].items():
            if key.startswith("Exec"):
                yield from ((f"{path.name} {key}", shlex.split(value.replace("%i", "billing"))[1:]) for value in values)
    for path in FILES:  # in prose: `relay check`; in examples: a line that begins with it
        for words in re.findall(
            r"`relay ([^`\n]+)`|^(?:#\s+)?(?:\S*/)?relay ([a-z][^|;&#\n]*)$", path.read_text(), re.MULTILINE
        ):
            text = words[0] or words[1]
            if words[0] or path.suffix == ".md":
                yield f"{path.name} `relay {text}`", shlex.split(text)


# --- settings ------------------------------------------------------------------------------------------------------


def test_every_relay_variable_is_a_setting() -> None:
    known = {environment_name(name) for name in setting_names()}
    known |= {f"{name}_FILE" for name in known} | {"RELAY_CONFIG"}
    named = {(path.name, name) for path in FILES for name in re.findall(r"\bRELAY_\w*[A-Z0-9]\b", path.read_text())}
    assert {name for _, name in named} >= {"RELAY_POSTGRES_DSN_FILE", "RELAY_RABBITMQ_URL_FILE"}
    assert not {(file, name) for file, name in named if name not in known}


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy") / "secrets"
    subprocess.run(["sh", str(DEPLOY / "secrets.sh"), str(folder)], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize(
    "name", [name for name, service in compose_services().items() if RELAY_IMAGE.search(service["image"])]
)
def test_a_compose_service_has_valid_settings(name: str, secrets: Path, tmp_path: Path) -> None:
    service = compose_services()[name]
    declared = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["secrets"]
    environ = {}
    for variable, value in service["environment"].items():
        if variable.endswith("_FILE"):
            secret = Path(value).name
            assert secret in service["secrets"], f"{name}: {variable} names a secret that is not mounted"
            environ[variable] = str(secrets / Path(declared[secret]["file"]).name)
        else:
            environ[variable] = value
    settings = load_settings(file=_empty_file(tmp_path), environ=environ)
    assert settings.postgres.dsn.get_secret_value().startswith("postgresql://")
    assert ":@" not in settings.postgres.dsn.get_secret_value()
    if service["command"] == ["run"]:
        assert settings.source is not None


def test_a_pod_has_valid_settings(tmp_path: Path) -> None:
    """The files of the secrets do not exist here; the settings file is the manifest's own."""
    (document,) = (m["data"]["relay.toml"] for m in manifests() if m["kind"] == "ConfigMap")
    file = tmp_path / "relay.toml"
    file.write_text(document)
    assert load_settings(file=file, environ={}).source is not None
    for pod in pods():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod_containers(pod):
            mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container.get("volumeMounts", [])}
            for variable in container.get("env", []):
                assert "secret" in mounts[str(Path(variable["value"]).parent)], variable


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_units_secrets_are_loaded_credentials(path: Path, tmp_path: Path) -> None:
    loaded = {line.split(":", 1)[0] for line in unit(path)["Service"]["LoadCredential"]}
    environ = unit_environment(path)
    assert {environ[name] for name in environ if name.endswith("_FILE")} == {f"%d/{name}" for name in loaded}
    (tmp_path / "postgres.dsn").write_text("postgresql://a:b@c/d\n")
    (tmp_path / "rabbitmq.url").write_text("amqp://a:b@c/\n")
    settings = load_settings(
        file=_empty_file(tmp_path),
        environ={name: value.replace("%d", str(tmp_path)) for name, value in environ.items()},
    )
    assert settings.postgres.dsn.get_secret_value() == "postgresql://a:b@c/d"


def test_secrets_are_random_private_and_never_overwritten(secrets: Path, tmp_path: Path) -> None:
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    declared = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["secrets"]
    assert {Path(entry["file"]).name for entry in declared.values()} == {path.name for path in secrets.iterdir()}
    for path in secrets.iterdir():  # another user's number in the container reads them
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
    passwords = {
        (secrets / name).read_text().strip() for name in ("postgres_password", "relay_password", "inbox_password")
    }
    assert len(passwords) == 3
    assert all(len(password) == 48 for password in passwords)
    again = subprocess.run(["sh", str(DEPLOY / "secrets.sh"), str(secrets)], check=False, capture_output=True)
    assert again.returncode == 1
    other = tmp_path / "other"
    subprocess.run(["sh", str(DEPLOY / "secrets.sh"), str(other)], check=True, capture_output=True)
    assert (other / "relay_password").read_text().strip() not in passwords


def test_broker_permissions_name_the_users_of_the_urls(secrets: Path) -> None:
    definitions = json.loads((secrets / "rabbitmq_definitions.json").read_text())
    for user, file in (("relay", "relay_url"), ("billing", "inbox_url")):
        (password,) = (entry["password"] for entry in definitions["users"] if entry["name"] == user)
        assert f"//{user}:{password}@" in (secrets / file).read_text()
    rights = {entry["user"]: entry for entry in definitions["permissions"]}
    exchange = Settings().rabbitmq.exchange
    assert re.match(rights["relay"]["write"], exchange)
    assert not re.match(rights["billing"]["write"], exchange)
    assert not re.match(rights["relay"]["read"], exchange)


def test_no_secret_is_written_down() -> None:
    for path in FILES:
        if path.name in ("relay.toml", "secrets.sh"):  # the defaults; and variables
            continue
        assert not re.search(r"(postgresql|amqps?)://\w+:\w+@", path.read_text()), path.name
    assert "secrets/" in (DEPLOY / ".gitignore").read_text().splitlines()
    (ignore, *kept) = (
        line for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] not in ("", "#")
    )
    assert ignore == "*"
    assert "!deploy" not in kept


# --- relay.toml ----------------------------------------------------------------------------------------------------


def example_toml() -> str:
    """deploy/relay.toml, from the settings themselves: a comment, then the key at its default, commented out."""
    lines = [
        "# relay.toml: every setting at its default. relay reads the file that --config or RELAY_CONFIG names, else relay.toml",
        "# in its working directory. A variable such as RELAY_OUTBOX_PAGE_ROWS or a flag `--set outbox.page_rows=500` wins over it.",
        "# Passwords do not belong here: RELAY_POSTGRES_DSN_FILE and RELAY_RABBITMQ_URL_FILE name files that hold them.",
    ]
    section = ""
    for name, field in walk_settings():
        before, _, key = name.rpartition(".")
        if before != section:
            section = before
            lines += ["", f"[{section}]"]
        lines += ["", *textwrap.wrap(str(field.description), 118, initial_indent="# ", subsequent_indent="# ")]
        lines.append(
            f"#{key} = {_toml(_default(field))}"
            if _default(field) is not None
            else f"#{key} = {_toml(EXAMPLES[name])}  # no default"
        )
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> Any:
    value = field.get_default(call_default_factory=True, validated_data={})
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def _toml(value: object) -> str:
    match value:
        case bool() | int() | str():
            return json.dumps(value)  # the same in TOML
        case float():
            return str(int(value)) if value == int(value) else repr(value)
        case tuple():
            return f"[{', '.join(map(_toml, value))}]"
        case dict() if not value:
            return "{}"
    raise AssertionError(f"no TOML for {value!r}")


def test_the_example_settings_file_is_generated_from_the_settings() -> None:
    assert (DEPLOY / "relay.toml").read_text() == example_toml(), (
        "run: python tests/unit/test_deploy.py > deploy/relay.toml"
    )


def test_the_example_settings_file_changes_nothing() -> None:
    assert load_settings(file=DEPLOY / "relay.toml", environ={}) == Settings()


def test_the_example_settings_file_uncommented_holds_every_setting_at_its_default(tmp_path: Path) -> None:
    text = re.sub(r"^#(?! )", "", (DEPLOY / "relay.toml").read_text(), flags=re.MULTILINE)
    tree = tomllib.loads(text)
    given = {f"{name}.{key}" for name, value in tree.items() if isinstance(value, dict) for key in value}
    assert given | {name for name, value in tree.items() if not isinstance(value, dict)} == set(setting_names())
    file = tmp_path / "relay.toml"
    file.write_text("\n".join(line for line in text.splitlines() if not line.endswith("  # no default")))
    assert load_settings(file=file, environ={}) == Settings()


def test_git_does_not_ignore_the_example_settings_file() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    ignored = subprocess.run(["git", "check-ignore", "-q", "deploy/relay.toml"], cwd=ROOT, check=False)
    assert ignored.returncode == 1


# --- commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "arguments"), [pytest.param(*found, id=found[0]) for found in relay_commands()])
def test_every_relay_command_line_parses(where: str, arguments: list[str]) -> None:
    from relay.cli.main import cli

    if arguments == ["inbox", "run"]:  # prose names the command, not the application
        arguments = [*arguments, "billing:inbox"]
    _parse(cli, click.Context(cli, info_name="relay"), arguments)


def _parse(group: click.Group, context: click.Context, arguments: list[str]) -> None:
    """Resolve the command and let it parse its arguments, without invoking it. Raises click.UsageError."""
    name, command, rest = group.resolve_command(context, arguments)
    assert command is not None
    if isinstance(command, click.Group):
        _parse(command, click.Context(command, info_name=name, parent=context), rest)
    else:
        command.make_context(name, rest, parent=context)


def test_a_command_line_that_does_not_parse_is_noticed() -> None:
    from relay.cli.main import cli

    for wrong in (["rum"], ["run", "--drian"], ["inbox", "walk"]):
        with pytest.raises(click.UsageError):
            _parse(cli, click.Context(cli, info_name="relay"), wrong)


def test_the_command_lines_are_found() -> None:
    found = [arguments for _, arguments in relay_commands()]
    for expected in (["run"], ["migrate"], ["check"], ["inbox", "run", "billing:inbox"]):
        assert expected in found


def test_the_example_inbox_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEPLOY))
    assert load("billing:inbox").event_types == {"OrderPaid"}


# --- stopping and restarting ---------------------------------------------------------------------------------------


def grace_s() -> float:
    return Settings().daemon.shutdown_grace_s + GOODBYE_S


def test_compose_waits_longer_than_the_drain() -> None:
    daemons = [s for s in compose_services().values() if RELAY_IMAGE.search(s["image"]) and s["command"] != ["migrate"]]
    assert len(daemons) == 2
    for service in daemons:
        assert _seconds(service["stop_grace_period"]) >= grace_s()


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)s", text)
    assert match is not None
    return float(match[1])


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_waits_longer_than_the_drain(path: Path) -> None:
    (timeout,) = unit(path)["Service"]["TimeoutStopSec"]
    assert float(timeout) >= grace_s()


def test_kubernetes_waits_longer_than_the_drain(tmp_path: Path) -> None:
    (document,) = (m["data"]["relay.toml"] for m in manifests() if m["kind"] == "ConfigMap")
    file = tmp_path / "relay.toml"
    file.write_text(document)
    grace = load_settings(file=file, environ={}).daemon.shutdown_grace_s
    (sidecar_pod,) = (pod for pod in pods() if "initContainers" in pod)
    assert (
        sidecar_pod["terminationGracePeriodSeconds"] >= grace + GOODBYE_S + 30
    )  # the application's own default of 30 s


def permanent_exit_codes() -> set[int]:
    """The codes that only errors have which waiting does not heal. 1 is not among them: any crash ends with it."""
    errors = list(_tree(RelayError))
    codes = {error.exit_code for error in errors if not error.retryable}
    return codes - {error.exit_code for error in errors if error.retryable} - {1}


def _tree(error: type[RelayError]) -> Iterator[type[RelayError]]:
    if error.__module__ == "relay.errors":
        yield error
    for below in error.__subclasses__():
        yield from _tree(below)


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_restarts_unless_waiting_does_not_heal(path: Path) -> None:
    service = unit(path)["Service"]
    (prevented,) = service["RestartPreventExitStatus"]
    assert service["Restart"] == ["on-failure"]
    assert {int(code) for code in prevented.split()} == permanent_exit_codes()


def test_the_migrating_job_gives_up_only_on_what_waiting_does_not_heal() -> None:
    (job,) = (m for m in manifests() if m["kind"] == "Job")
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert set(rule["onExitCodes"]["values"]) <= permanent_exit_codes()
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # a podFailurePolicy asks for it


# --- rights --------------------------------------------------------------------------------------------------------


def test_the_image_runs_as_a_number_that_is_not_root() -> None:
    user, _, group = instruction("USER").partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert json.loads(instruction("ENTRYPOINT")) == ["relay"]
    assert instruction("STOPSIGNAL") == "SIGTERM"
    words = [word for word, _ in final_stage()]
    assert "RUN" not in words, "the final stage only copies: nothing is compiled, downloaded or left over in it"


def test_the_image_is_built_from_a_pinned_base_and_the_source_tree() -> None:
    instructions = dockerfile()
    bases = [rest.split()[0] for word, rest in instructions if word == "FROM"]
    assert len(bases) == 2
    assert len(set(bases)) == 1, "the environment is copied between stages: both need the same Python"
    assert re.fullmatch(r"python:3\.\d+-slim(-\w+)?", bases[0])
    assert "ADD" not in {word for word, _ in instructions}
    assert not any("://" in rest for _, rest in instructions)
    copied = [rest.split()[:-1] for word, rest in instructions if word == "COPY" and not rest.startswith("--from")]
    for source in (source for sources in copied for source in sources):
        assert (ROOT / source).exists(), source


def test_the_image_holds_no_secret() -> None:
    for word, rest in dockerfile():
        assert not (word in ("ENV", "ARG") and re.search("RELAY_|PASSWORD|TOKEN|SECRET", rest)), rest


@pytest.mark.parametrize("name", compose_services())
def test_a_compose_service_has_few_rights(name: str) -> None:
    service = compose_services()[name]
    if RELAY_IMAGE.search(service["image"]):
        assert service["build"] == {"context": "..", "dockerfile": "deploy/Dockerfile"}  # whose USER is checked above
        assert service["read_only"] is True
        assert "user" not in service
    else:
        assert service["user"] not in ("root", "0")
        tag = service["image"].rpartition(":")[2]
        assert re.match(r"\d+", tag), f"{service['image']} is not pinned to a version"
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service


def test_every_published_port_is_bound_to_loopback() -> None:
    ports = [port for service in compose_services().values() for port in service.get("ports", [])]
    assert len(ports) == 2
    for port in ports:
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), port
    for pod in pods():
        for container in pod_containers(pod):
            assert not container.get("ports")
    assert not any(word == "EXPOSE" for word, _ in dockerfile())


def test_every_compose_server_has_a_healthcheck_and_every_dependency_is_there() -> None:
    services = compose_services()
    for name in ("postgres", "rabbitmq"):
        assert services[name]["healthcheck"]["test"][0] == "CMD"
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in services, f"{name} depends on {needed}"
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[needed]
            if how["condition"] == "service_completed_successfully":
                assert services[needed]["restart"] == "no"
        for volume in service.get("volumes", []):
            if volume.startswith("./"):
                assert (DEPLOY / volume.split(":")[0]).is_file()


def test_pods_have_few_rights() -> None:
    user = int(instruction("USER").partition(":")[0])
    assert len(pods()) == 2
    for pod in pods():
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False  # RELAY_SERVICE_HOST of a Service called relay is not a setting
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == user
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod_containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]
            assert re.search(r":\d", container["image"])


def test_the_sidecar_is_native_and_the_schema_has_a_job() -> None:
    (sidecar,) = (container for pod in pods() for container in pod.get("initContainers", []))
    assert sidecar["restartPolicy"] == "Always"
    assert sidecar["args"] == ["run"]
    assert not any(probe in sidecar for probe in ("livenessProbe", "readinessProbe", "startupProbe"))
    assert [m["kind"] for m in manifests()] == ["ConfigMap", "Job", "Deployment"]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_is_hardened(path: Path) -> None:
    service = unit(path)["Service"]
    for key, value in {
        "DynamicUser": "yes",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "CapabilityBoundingSet": "",
        "LimitCORE": "0",
    }.items():
        assert service[key] == [value]
    assert "User" not in service


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_understands_the_unit(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / path.name.replace("@.", "@billing.")
    copy.write_text(re.sub(r"^ExecStart=.*$", "ExecStart=/bin/true", path.read_text(), flags=re.MULTILINE))
    parser = configparser.RawConfigParser(strict=False)
    parser.read(copy)
    assert parser.sections() == ["Unit", "Service", "Install"]
    if shutil.which("systemd-analyze") is None:
        return
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(copy)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    complaints = [line for line in verified.stderr.splitlines() if path.name.split(".")[0].rstrip("@") in line]
    assert (verified.returncode, complaints) == (0, [])


def test_the_example_python_files_parse() -> None:
    for path in DEPLOY.glob("*.py"):
        ast.parse(path.read_text())


def _empty_file(folder: Path) -> Path:
    """Settings from the environment alone, whatever relay.toml lies in the working directory."""
    file = folder / "empty.toml"
    file.write_text("")
    return file


if __name__ == "__main__":
    print(example_toml(), end="")
