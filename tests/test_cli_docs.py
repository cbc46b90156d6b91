"""docs/cli.md is the help of every command. `python tests/test_cli_docs.py` writes it anew."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

import pipeline.cli
from pipeline.options import split_beam_options

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "cli.md"
WIDTH = 100
HEAD = """\
# Commands

Every command, as its `--help` shows it. This page is made from the code
(`python tests/test_cli_docs.py`), and a test compares them.

Exit codes are in [operations.md](operations.md#exit-codes). A shell completes commands, options and files after

```console
$ earmark completion bash > ~/.local/share/bash-completion/completions/earmark
$ earmark completion zsh > ~/.zfunc/_earmark
$ earmark completion fish > ~/.config/fish/completions/earmark.fish
```

"""


def commands(command=pipeline.cli.cli, path=("earmark",), above=None):
    """(path, command, context) of a command and of all below it, by name."""
    context = click.Context(
        command, above, info_name=path[-1], terminal_width=WIDTH, max_content_width=WIDTH,
        **command.context_settings,
    )  # fmt: skip
    yield path, command, context
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            yield from commands(command.commands[name], (*path, name), context)


def document():
    """What docs/cli.md has to hold."""
    parts = [HEAD]
    for path, command, context in commands():
        command._help_option = None  # click keeps that of whoever asked first
        shown = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
        parts.append(f"## {' '.join(path)}\n\n```text\n{shown}\n```\n")
    return parts[0] + "\n".join(parts[1:])


def test_the_page_is_that_of_the_code():
    assert DOCUMENT.read_text("utf-8") == document(), "python tests/test_cli_docs.py"


def examples(command):
    """The commands of a help's examples."""
    _, _, below = (command.epilog or "").partition("Examples:\n")
    return [line.strip() for line in below.splitlines() if line.strip()]


EXAMPLES = [(path[-1], line) for path, command, _ in commands() for line in examples(command)]


def test_the_commands_that_are_used_most_have_examples():
    named = {name for name, _ in EXAMPLES}
    assert {
        "annotate", "completion", "demo", "distill", "doctor", "estimate", "evaluate", "retag", "schema",
    } <= named  # fmt: skip


@pytest.mark.parametrize(("name", "line"), EXAMPLES)
def test_earmark_takes_its_examples(name, line):
    found = 0
    for words in parts_of(line):
        if words[0] != "earmark":
            continue
        command, arguments = pipeline.cli.cli.commands[words[1]], words[2:]
        context = command.make_context(words[1], list(arguments))
        found += words[1] == name
        if command.context_settings.get("ignore_unknown_options"):
            own = [option for parameter in command.params for option in parameter.opts]
            split_beam_options(context.params["inputs"], own)
    assert found


def parts_of(line):
    """The commands of a shell line, without where their output goes."""
    inside = re.fullmatch(r'eval "\$\((.+)\)"', line)
    for part in re.split(r" (?:&&|\|) ", inside[1] if inside else line):
        yield shlex.split(part.partition(" > ")[0])


# ---------------------------------------------------------------------- completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_s_script_asks_earmark(shell):
    script = earmark("completion", shell)
    assert f"_EARMARK_COMPLETE={shell}_complete" in script and "earmark" in script


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("earmark ann", ["plain,annotate"]),
        ("earmark annotate --score-type f", ["plain,float32", "plain,float16"]),
        ("earmark annotate --output t", ["dir,t"]),
        ("earmark annotate sh", ["file,sh"]),
        ("earmark doctor --che", ["plain,--checkpoint"]),
    ],
)
def test_bash_gets_what_can_follow(line, expected):
    words = line.split()
    env = {
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "_EARMARK_COMPLETE": "bash_complete",
    }
    assert earmark(env=env).split() == expected


def earmark(*arguments, env=None):
    code = "from pipeline.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT, env=os.environ | (env or {}), capture_output=True, text=True,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    return done.stdout


if __name__ == "__main__":
    DOCUMENT.write_text(document(), "utf-8")
