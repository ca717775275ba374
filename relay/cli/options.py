"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from relay.errors import ConfigError
from relay.settings import Settings, load_settings

config_option = click.option(
    "--config",
    "-c",
    envvar="RELAY_CONFIG",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Settings file. Default: relay.toml in this folder, if there is one.",
)
set_option = click.option(
    "--set",
    "-s",
    "assignments",
    multiple=True,
    metavar="NAME=VALUE",
    help="One setting, for example -s outbox.page_rows=500. Repeatable.",
)


def settings_from(config: Path | None, assignments: tuple[str, ...] = (), **flags: Any) -> Settings:
    """The settings of a command: file, environment, --set, and the command's own flags that were given."""
    given: dict[str, Any] = {}
    for assignment in assignments:
        name, sign, value = assignment.partition("=")
        if not sign:
            raise ConfigError(f"--set {name}: expected NAME=VALUE")
        if name.strip() in _SECRETS:
            raise ConfigError(
                f"--set {name.strip()}: a secret on the command line is visible to every user; use the file or the environment"
            )
        given[name.strip()] = value
    given.update({name.replace("__", "."): value for name, value in flags.items() if value is not None})
    return load_settings(file=config, flags=given)


_SECRETS = {"postgres.dsn", "rabbitmq.url"}
