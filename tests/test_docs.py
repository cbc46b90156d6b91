"""The documents say what the code does: metrics, limits, messages, commands, links."""

import ast
import re
import shlex
from pathlib import Path

import click
import pytest
from apache_beam.options.pipeline_options import PipelineOptions

import pipeline.cli
import pipeline.terminal
from pipeline.options import split_beam_options
from transforms import output, storage
from transforms.annotate import Waits
from transforms.meter import COUNTERS, DISTRIBUTIONS

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
LINKED = [*DOCS, ROOT / "bench" / "README.md", ROOT / "deploy" / "README.md"]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text("utf-8")
RELIABILITY = (ROOT / "docs" / "reliability.md").read_text("utf-8")

FENCE = re.compile(r"^( *)```.*?^\1```$", flags=re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`[^`\n]+`")


def section(text, heading):
    """What stands under a heading, up to the next of its level or above."""
    level, rest = re.split(rf"^(#+) {re.escape(heading)}$", text, flags=re.MULTILINE)[1:3]
    return re.split(rf"^#{{1,{len(level)}}} ", rest, flags=re.MULTILINE)[0]


def rows(text):
    """The cells of a table's rows, without its header."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


# ---------------------------------------------------------------------- what the code does


@pytest.mark.parametrize(
    ("heading", "metrics"), [("Counters", COUNTERS), ("Distributions", DISTRIBUTIONS)]
)
def test_every_metric_is_documented_and_no_other(heading, metrics):
    table = rows(section(OPERATIONS, heading))
    assert [cells[0] for cells in table] == [f"`{name}`" for name in metrics]
    for name, cells in zip(metrics, table, strict=True):
        assert len(cells) == 4 and cells[1] and cells[2], f"{name}: what is it, what is normal?"


def test_the_limits_are_those_of_the_code():
    reading, small, listing, writing = rows(section(RELIABILITY, "What is tried again"))
    assert f"no byte for {storage.STALL_S:.0f} s" in reading[1]
    assert f"{storage.MAX_TRIES} tries" in reading[2]
    assert f"{storage.FIRST_WAIT_S} s to {storage.MAX_WAIT_S:.0f} s" in reading[2]
    in_all_s = storage.counted_retry("read_retries")._timeout
    assert all(f"{in_all_s:.0f} s" in cells[2] for cells in (small, listing, writing))
    assert f"after {output._WRITE_TIMEOUT_S[1]} s without a byte" in writing[2]
    counters = [cells[3].strip("`") for cells in (reading, small, listing, writing)]
    assert counters == ["read_retries", "read_retries", "list_retries", "write_retries"]


def test_the_exit_codes_are_those_of_the_code():
    codes = {cells[0] for cells in rows(section(OPERATIONS, "Exit codes"))}
    stated = {v for k, v in vars(pipeline.terminal).items() if k.startswith("EXIT_")}
    assert codes - {c for c in codes if c.startswith("128")} == {"0"} | {str(c) for c in stated}


def test_what_a_worker_logs_is_documented():
    waits = Waits()
    waits.add({"wait_for_audio_msec": [3], "wait_for_model_msec": [71], "shard_msec": [100]})
    log = section(OPERATIONS, "The worker's log")
    assert f"| `{waits.sentence()}` |" in log
    texts = said()
    for beginning in ("begins ", "loaded ", "a batch of "):
        assert f"| `{beginning}" in log
        assert any(text.startswith(beginning) for text in texts), beginning


def test_the_messages_of_the_table_are_the_code_s():
    texts = said()
    messages = [
        message
        for cells in rows(section(OPERATIONS, "When it fails"))
        for message in CODE.findall(cells[0])
        if "..." in message
    ]
    assert len(messages) >= 10
    for message in messages:
        parts = [part.strip() for part in message.strip("`").split("...")]
        assert any(all(part in text for part in parts) for text in texts), message


def said():
    """Every text in the code; what is filled in is left out."""
    texts = []
    for package in ("evaluation", "pipeline", "student", "training", "transforms"):
        for file in (ROOT / package).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = (p.value for p in node.values if isinstance(p, ast.Constant))
                    texts.append("\0".join(parts))
    return texts


# ---------------------------------------------------------------------- commands


def commands(text):
    """The `earmark` commands of its console blocks."""
    blocks = re.findall(r"^ *```console\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    lines = (line.strip() for block in blocks for line in block.splitlines())
    return [line[2:] for line in lines if line.startswith("$ earmark ")]


@pytest.mark.parametrize(
    ("document", "command"),
    [(file.name, command) for file in DOCS for command in commands(file.read_text("utf-8"))],
    ids=lambda text: text.removeprefix("earmark ")[:40],
)
def test_earmark_and_beam_take_the_commands(document, command):
    words = shlex.split(re.sub(r"\$\{?(\w+)\}?", r"gs://\1", command))
    for end in (">", "|"):
        words = words[: words.index(end)] if end in words else words
    name, arguments = words[1], words[2:]
    known = pipeline.cli.cli.commands[name]
    context = known.make_context(name, list(arguments))
    if name != "annotate":
        return
    own = [option for parameter in known.params for option in parameter.opts]
    inputs, beam = split_beam_options(context.params["inputs"], own)
    assert inputs or context.params["inputs_from"]
    parsed = PipelineOptions(list(beam)).get_all_options(drop_default=True)
    given = {word.partition("=")[0].lstrip("-") for word in beam if word.startswith("--")}
    assert set(parsed) <= given


def test_there_are_commands_and_a_wrong_one_is_seen():
    assert commands(OPERATIONS) and commands((ROOT / "docs" / "runners.md").read_text("utf-8"))
    with pytest.raises(click.UsageError):
        test_earmark_and_beam_take_the_commands("", "earmark annotate a --output b --dtype int4")
    with pytest.raises(ValueError, match="No such option: --runer"):
        test_earmark_and_beam_take_the_commands("", "earmark annotate a --output b --runer x")


# ---------------------------------------------------------------------- links


def anchors(file):
    """Where a link's `#...` can lead, as GitHub names headings."""
    found = set()
    for title in re.findall(r"^#+ (.+)$", FENCE.sub("", file.read_text("utf-8")), re.MULTILINE):
        shown = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        number = 0
        while (numbered := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(numbered)
    return found


@pytest.mark.parametrize("file", LINKED, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    prose = CODE.sub("", FENCE.sub("", file.read_text("utf-8")))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith("https://"):
            continue
        place, _, anchor = target.partition("#")
        there = (file.parent / place).resolve() if place else file
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), target
