"""RabbitMQ for demo, tests and benchmarks: a throwaway broker of our own, or one that the environment names."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import aiormq

from relay.errors import SandboxError
from relay.sandbox.account import private_folder, remove_folder
from relay.sandbox.management import ManagementApi
from relay.sandbox.ports import LOOPBACK, free_ports
from relay.sandbox.process import KeptProcess
from relay.sandbox.rabbitmq_programs import find_rabbitmq_programs

EXTERNAL_URL = "RELAY_TEST_RABBITMQ_URL"
EXTERNAL_MANAGEMENT_URL = "RELAY_TEST_RABBITMQ_MANAGEMENT_URL"

USER = "relay"
PLUGINS = ("rabbitmq_consistent_hash_exchange", "rabbitmq_management")
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 30.0
CTL_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 5.0

# The Erlang distribution listens on all interfaces unless told otherwise, for the broker and for rabbitmqctl alike.
LOOPBACK_DISTRIBUTION = "-kernel inet_dist_use_interface {127,0,0,1}"


class RabbitMQ(ABC):
    """A broker in which we may create virtual hosts. Every method blocks: in async code use `asyncio.to_thread`."""

    external: bool

    @abstractmethod
    def url(self, vhost: str = "/") -> str:
        """The AMQP address of one virtual host, with its password."""

    @abstractmethod
    def start(self) -> Self:
        """Start the broker and wait until it accepts connections. An external broker is not touched."""

    @abstractmethod
    def stop(self) -> None:
        """Stop the broker and delete its data. Safe to call twice. An external broker is not touched."""

    @abstractmethod
    def restart(self) -> None:
        """Stop the broker gracefully and start it again on the same ports with the same data."""

    @abstractmethod
    def kill9(self) -> None:
        """Kill the broker with SIGKILL, then whatever it leaves behind. The data stay for `start_again`."""

    @abstractmethod
    def start_again(self) -> None:
        """Start a killed broker on the same ports with the same data, and wait until it accepts connections."""

    @abstractmethod
    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl on this broker and return what it printed; about a second, most of it Erlang's start."""

    @abstractmethod
    def management(self) -> ManagementApi:
        """The broker's management API."""

    def create_vhost(self, name: str) -> str:
        """Create a virtual host in which our user may do all; return its URL."""
        self.management().create_vhost(name)
        return self.url(name)

    def delete_vhost(self, name: str) -> None:
        """Delete a virtual host with all that is in it; its connections are closed. Quiet if there is none."""
        self.management().delete_vhost(name)

    def purge_queue(self, queue: str, vhost: str = "/") -> None:
        """Throw away the ready messages of a queue."""
        self.ctl("purge_queue", "-p", vhost, queue)

    def close_all_connections(self, reason: str = "closed by the sandbox", *, vhost: str | None = None) -> None:
        """Close every client connection of the broker, or of one virtual host, from the broker's side."""
        scope = ("--global",) if vhost is None else ("-p", vhost)
        self.ctl("close_all_connections", *scope, reason)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


class ExternalRabbitMQ(RabbitMQ):
    """A broker that somebody else runs: we create and delete virtual hosts in it and never stop it.

    Its management API is taken to be at the same host, port 15672; RELAY_TEST_RABBITMQ_MANAGEMENT_URL says otherwise.
    """

    external = True

    def __init__(self, url: str, management_url: str | None = None) -> None:
        self._parts = urlsplit(url)
        self._management_url = management_url or f"http://{self._parts.hostname}:15672"

    def url(self, vhost: str = "/") -> str:
        return urlunsplit(self._parts._replace(path=f"/{quote(vhost, safe='')}"))

    def start(self) -> Self:
        return self

    def stop(self) -> None:
        return

    def restart(self) -> None:
        raise self._not_ours("restart")

    def kill9(self) -> None:
        raise self._not_ours("kill")

    def start_again(self) -> None:
        raise self._not_ours("start")

    def ctl(self, *arguments: str) -> str:
        raise self._not_ours(f"run rabbitmqctl {arguments[0]} on")

    def management(self) -> ManagementApi:
        user = unquote(self._parts.username or "guest")
        password = unquote(self._parts.password or "guest")
        return ManagementApi(self._management_url, user=user, password=password)

    def _not_ours(self, verb: str) -> SandboxError:
        return SandboxError(f"cannot {verb} the RabbitMQ of {EXTERNAL_URL}: it is not ours; unset the variable")


class SandboxRabbitMQ(RabbitMQ):
    """A private broker in a temporary folder: loopback only, own cookie, user, ports and epmd; it ends when we do.

    `plugins` are enabled from the start; without rabbitmq_management there are no `create_vhost` and `delete_vhost`.
    `config` are lines added to rabbitmq.conf. Nothing is started before `start()`.
    """

    external = False

    def __init__(self, *, plugins: Sequence[str] = PLUGINS, config: Sequence[str] = ()) -> None:
        self._programs = find_rabbitmq_programs()
        self._plugins = tuple(plugins)
        self._config = tuple(config)
        self._password = secrets.token_urlsafe(24)
        self._node = f"relay-{secrets.token_hex(4)}@localhost"
        self._port = self._dist_port = self._management_port = self._epmd_port = 0
        self._folder: Path | None = None
        self._process: KeptProcess | None = None

    @property
    def port(self) -> int:
        """The AMQP port on 127.0.0.1, the same over all restarts; 0 before `start()`."""
        return self._port

    @property
    def management_port(self) -> int:
        """The management API's port on 127.0.0.1; 0 before `start()`."""
        return self._management_port

    @property
    def log(self) -> Path:
        """The broker's log file."""
        return self._home() / "broker.log"

    @property
    def pid(self) -> int:
        """The process id of Erlang's virtual machine."""
        return self._running().pid

    def url(self, vhost: str = "/") -> str:
        return f"amqp://{USER}:{self._password}@{LOOPBACK}:{self._port}/{quote(vhost, safe='')}"

    def start(self) -> Self:
        if self._folder is not None:
            raise SandboxError("this RabbitMQ was started already; start_again() is for one that was killed")
        self._folder = private_folder("relay-rabbitmq-")
        self._port, self._dist_port, self._management_port, self._epmd_port = free_ports(4)
        try:
            self._write_files()
            self.start_again()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        if self._process is not None:
            # No farewell: the data are deleted in the next line.
            self._process.end(signal.SIGKILL, timeout_s=STOP_TIMEOUT_S)
            self._process = None
        if self._folder is not None:
            remove_folder(self._folder)
            self._folder = None

    def restart(self) -> None:
        # RabbitMQ takes SIGTERM as `rabbitmqctl stop`.
        self._running().end(signal.SIGTERM, timeout_s=STOP_TIMEOUT_S)
        self.start_again()

    def kill9(self) -> None:
        self._running().end(signal.SIGKILL, timeout_s=STOP_TIMEOUT_S)

    def start_again(self) -> None:
        if self._process is not None and self._process.running:
            raise SandboxError("RabbitMQ is running")
        self._process = KeptProcess(
            [str(self._programs.server)], folder=self._home(), log=self.log, env=self._environment()
        )
        self._process.wait_until(self._accepts_connections, timeout_s=START_TIMEOUT_S)

    def ctl(self, *arguments: str) -> str:
        command = [str(self._programs.ctl), "--quiet", *arguments]
        done = subprocess.run(
            command,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CTL_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise SandboxError(f"rabbitmqctl {' '.join(arguments)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def management(self) -> ManagementApi:
        if "rabbitmq_management" not in self._plugins:
            raise SandboxError("this RabbitMQ was made without the rabbitmq_management plugin")
        return ManagementApi(f"http://{LOOPBACK}:{self._management_port}", user=USER, password=self._password)

    def _write_files(self) -> None:
        home = self._home()
        (home / "enabled_plugins").write_text(f"[{','.join(self._plugins)}].\n")
        (home / "rabbitmq.conf").write_text("\n".join((*self._settings(), *self._config)) + "\n")
        (home / "rabbitmq-env.conf").touch()  # instead of the machine's /etc/rabbitmq/rabbitmq-env.conf
        cookie = home / ".erlang.cookie"
        cookie.touch(mode=0o600)
        cookie.write_text(secrets.token_hex(20))
        cookie.chmod(0o400)  # Erlang refuses a cookie that anybody else can read

    def _settings(self) -> list[str]:
        settings = [
            f"listeners.tcp.1 = {LOOPBACK}:{self._port}",
            f"default_user = {USER}",  # made instead of guest, not beside it
            f"default_pass = {self._password}",
            "log.console = true",
            "log.console.level = info",
            "log.file = false",
            "disk_free_limit.absolute = 50MB",
        ]
        if "rabbitmq_management" in self._plugins:
            settings += [f"management.tcp.ip = {LOOPBACK}", f"management.tcp.port = {self._management_port}"]
        return settings

    def _environment(self) -> dict[str, str]:
        """All that RabbitMQ and rabbitmqctl may know: nothing of the machine's own broker, epmd or cookie."""
        home = self._home()
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "HOME": str(home),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": LOOPBACK,
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_NODE_PORT": str(self._port),
            "RABBITMQ_NODE_IP_ADDRESS": LOOPBACK,
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_BASE": str(home),
            "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
            "RABBITMQ_LOG_BASE": str(home / "log"),
            "RABBITMQ_PID_FILE": str(home / "pid"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "enabled_plugins"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(home / "generated"),
            "RABBITMQ_FEATURE_FLAGS_FILE": str(home / "feature_flags"),
            "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(home / "rabbitmq-env.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(home / "advanced.config"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": LOOPBACK_DISTRIBUTION,
            "RABBITMQ_CTL_ERL_ARGS": LOOPBACK_DISTRIBUTION,
            # The start script then execs Erlang instead of waiting beside it, so that our pid is Erlang's.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    def _home(self) -> Path:
        if self._folder is None:
            raise SandboxError("this RabbitMQ is not started")
        return self._folder

    def _running(self) -> KeptProcess:
        if self._process is None or not self._process.running:
            raise SandboxError("this RabbitMQ is not running")
        return self._process

    def _accepts_connections(self) -> bool:
        if not _listens(self._port) or not _can_connect(self.url()):
            return False
        return "rabbitmq_management" not in self._plugins or self.management().answers()


def find_rabbitmq() -> RabbitMQ:
    """The broker of RELAY_TEST_RABBITMQ_URL if that is set, else a private one. Not started yet."""
    url = os.environ.get(EXTERNAL_URL)
    return ExternalRabbitMQ(url, os.environ.get(EXTERNAL_MANAGEMENT_URL)) if url else SandboxRabbitMQ()


def _listens(port: int) -> bool:
    """A cheap look before the real connection, whose every failure aiormq would log."""
    try:
        with socket.create_connection((LOOPBACK, port), timeout=CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


def _can_connect(url: str) -> bool:
    """One real connection with login, from code with or without a running event loop."""
    connected = threading.Event()

    def run() -> None:
        if asyncio.run(_connects(url)):
            connected.set()

    thread = threading.Thread(target=run, name="relay-sandbox-amqp")
    thread.start()
    thread.join()
    return connected.is_set()


async def _connects(url: str) -> bool:
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            connection = await aiormq.connect(url)
            await connection.close()
    except (OSError, TimeoutError, aiormq.exceptions.AMQPError):
        return False
    return True
