"""The Flex Template's entry point: its parameters are the options of `earmark annotate`.

    python template.py --metadata > metadata.json

writes the template's metadata from the command line's own options. In the image Dataflow's
launcher runs this file with `--name=value` for each parameter, and with Beam's options.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click

# These are for a person at a terminal, or for a run on the launching machine itself; the launcher of a
# template submits the job and ends.
LEFT_OUT = {"dry_run", "job_file", "detach", "profile", "device", "devices", "processes_per_gpu"}

_INPUTS_HELP = "What to tag; several are separated by spaces, one that holds a space is quoted."


def main() -> None:
    """Prints the metadata, or runs `earmark annotate` with what the launcher gave."""
    from pipeline.cli import annotate
    from pipeline.cli import main as earmark

    if sys.argv[1:] == ["--metadata"]:
        print(json.dumps(metadata(annotate), indent=2))
        return
    try:
        sys.argv[1:] = ["annotate", "--detach", *command_line(annotate, sys.argv[1:])]
    except ValueError as error:
        sys.exit(f"Error: {error}")
    earmark()


def metadata(command: click.Command) -> dict[str, Any]:
    """The metadata of a Flex Template that takes `command`'s parameters."""
    return {
        "name": "Earmark",
        "description": "Tag every clip of audio shards with AudioSet's 527 labels; write Parquet.",
        "parameters": [_parameter(option) for option in template_parameters(command)],
    }


def template_parameters(command: click.Command) -> list[click.Parameter]:
    """The parameters of `command` that a template has, in order."""
    return [parameter for parameter in command.params if parameter.name not in LEFT_OUT]


def command_line(command: click.Command, given: Iterable[str]) -> list[str]:
    """What the launcher gives, as a person would type it; Beam's options stay as they are.

    Args:
        command: whose options are told from Beam's.
        given: `--name=value` each, names with underscores.

    Raises:
        ValueError: a flag is neither true nor false, or a quote is not closed.
    """
    known = {str(parameter.name): parameter for parameter in template_parameters(command)}
    inputs: list[str] = []
    options: list[str] = []
    for argument in given:
        name, has_value, value = argument.partition("=")
        parameter = known.get(name.removeprefix("--"))
        if parameter is None or not has_value:
            options.append(argument)
        elif isinstance(parameter, click.Argument):
            inputs += shlex.split(value)
        elif not value:
            continue  # a field of the console's form that was left empty
        elif getattr(parameter, "is_flag", False):
            if value.lower() not in ("true", "false"):
                raise ValueError(f"parameter {parameter.name} is {value!r}, expected true or false")
            options += [_long(parameter)] * (value.lower() == "true")
        else:
            options.append(f"{_long(parameter)}={value}")
    return [*options, *inputs]


def _parameter(parameter: click.Parameter) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": parameter.name,
        "label": str(parameter.name).replace("_", " ").capitalize(),
        "helpText": _INPUTS_HELP if isinstance(parameter, click.Argument) else _help(parameter),
        "isOptional": not parameter.required,
    }
    pattern = _pattern(parameter)
    return described | ({"regexes": [pattern]} if pattern else {})


def _help(option: click.Parameter) -> str:
    text = " ".join(str(getattr(option, "help", "")).split())
    default = option.default if getattr(option, "show_default", False) else None
    return text if default is None else f"{text} [default: {default}]"


def _pattern(parameter: click.Parameter) -> str | None:
    """A pattern for values that click would take, where that can be said in one."""
    if getattr(parameter, "is_flag", False):
        return "^(true|false)$"
    if isinstance(parameter.type, click.Choice):
        return f"^({'|'.join(re.escape(str(choice)) for choice in parameter.type.choices)})$"
    if isinstance(parameter.type, click.types.IntParamType):
        return "^[0-9]+$"
    if isinstance(parameter.type, click.types.FloatParamType):
        return r"^[0-9]*\.?[0-9]+$"
    return None


def _long(parameter: click.Parameter) -> str:
    names: Sequence[str] = parameter.opts
    return max(names, key=len)


if __name__ == "__main__":
    main()
