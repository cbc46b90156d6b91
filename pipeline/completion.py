"""`earmark completion`: the script with which a shell completes earmark's commands and options."""

from __future__ import annotations

import os
from collections.abc import Iterator

import click
from click.shell_completion import CompletionItem, get_completion_class

from pipeline import flags

VARIABLE = "_EARMARK_COMPLETE"  # click's name for it: the shell's script sets it

# What a parameter is that is shown so in the help, for the shell to complete.
_FILES = ("FILE", "INPUT", "DATA", "PATH", "OUTPUT|DATA", "C")
_FOLDERS = ("DIR", "FOLDER", "OUTPUT")


@click.command(
    epilog=flags.examples(
        'eval "$(earmark completion bash)"',
        "earmark completion zsh > ~/.zfunc/_earmark",
        "earmark completion fish > ~/.config/fish/completions/earmark.fish",
    )
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes SHELL complete earmark's commands, options and files."""
    kind = get_completion_class(shell)
    assert kind is not None  # click has these three
    click.echo(kind(context.find_root().command, {}, "earmark", VARIABLE).source())


def complete_paths(command: click.Command) -> None:
    """Lets the shell complete files and folders, where a shell asks: click knows them as text alone."""
    if VARIABLE not in os.environ:
        return
    for parameter in _parameters(command):
        shown = (parameter.metavar or "").strip("[].")
        kind = "file" if shown in _FILES else "dir" if shown in _FOLDERS else None
        if kind is not None:
            parameter.shell_complete = _of_kind(kind)  # type: ignore[method-assign]


def _of_kind(kind: str):
    def complete(context: click.Context, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type=kind)]

    return complete


def _parameters(command: click.Command) -> Iterator[click.Parameter]:
    yield from command.params
    if isinstance(command, click.Group):
        for below in command.commands.values():
            yield from _parameters(below)
