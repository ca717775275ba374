"""`relay completion`: what a shell needs to complete relay's commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that completes relay's commands and options.

    \b
    eval "$(relay completion bash)"                              in ~/.bashrc
    eval "$(relay completion zsh)"                               in ~/.zshrc
    relay completion fish > ~/.config/fish/completions/relay.fish
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"click does not know the shell {shell}")
    click.echo(kind(ctx.find_root().command, {}, "relay", "_RELAY_COMPLETE").source())
