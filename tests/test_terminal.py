"""Names are data: none is obeyed by a terminal, and none leads out of the output."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from rich.console import Console

from pipeline import display
from pipeline.cli import cli
from pipeline.options import UsageError
from pipeline.terminal import errors_said, printable
from pipeline.verify import verify_output

ROOT = Path(__file__).parent.parent

NAMES = [
    "with space.wav",
    "quo'te\"s.wav",
    "line\nend.wav",
    "emoji-🐕.wav",
    "../../outside.wav",
    "/etc/absolute.wav",
    "a/../../b.wav",
    "esc-\x1b[2J\x1b]0;title\x07.wav",
    "bell\x07\x08\x7f.wav",
    "c1-\x9b31m.wav",
    "turned-\u202egpj.wav",
    "[red]markup[/red].wav",
    "tab\t.wav",
    "x" * 200 + ".wav",
]
OBEYED = ("\x1b", "\x07", "\x08", "\x9b", "\x7f", "\u202e")


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain äö 🐕 日本", "plain äö 🐕 日本"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb\tc\r", "a\nb\\tc\\r"),
        ("\x9b\x7f\u202e\u2028\ud800", "\\x9b\\x7f\\u202e\\u2028\\ud800"),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(raw, shown):
    assert printable(raw) == shown


@pytest.fixture(scope="module")
def annotated(tmp_path_factory, make_tar, encoded, noise, tiny_checkpoint):
    """(the folder around, what was printed) of a run over a tar with `NAMES`, half of them broken."""
    folder = tmp_path_factory.mktemp("names")
    (folder / "in").mkdir()
    tar = make_tar(
        folder / "in" / "a\x1b[1m.tar",
        [(name, encoded(noise(5_000)) if n % 2 else b"no audio") for n, name in enumerate(NAMES)],
    )
    command = [
        "annotate",
        str(tar),
        "-o",
        str(folder / "out"),
        "--checkpoint",
        str(tiny_checkpoint),
    ]
    done = CliRunner().invoke(cli, [*command, "--dry-run"])
    again = CliRunner().invoke(cli, command)
    assert (done.exit_code, again.exit_code) == (0, 0), done.output + again.output
    return folder, done.output + again.output


def test_names_are_data_and_nothing_is_written_elsewhere(annotated):
    folder, said = annotated
    assert not any(mark in said for mark in OBEYED)
    everything = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    (clips,) = (folder / "out" / "clips").iterdir()
    assert everything == {
        "in/a\x1b[1m.tar",
        *(f"out/{name}" for name in ("run.json", "labels.parquet", "summary.json")),
        f"out/clips/{clips.name}",
    }
    assert clips.name.isascii() and clips.name.isprintable()
    assert not (folder.parent / "outside.wav").exists() and not Path("/etc/absolute.wav").exists()
    members = pq.read_table(clips)["member"].to_pylist()
    # tarfile takes the first slash of an absolute name away; the rest is to the letter.
    assert sorted(members) == sorted(NAMES) or sorted(members) == sorted(
        n.lstrip("/") for n in NAMES
    )
    assert verify_output(str(folder / "out"), audio=True).named == {}


def test_retry_and_verify_print_no_name_as_it_is(annotated):
    folder, _ = annotated
    for command in (["retry"], ["verify"], ["verify", "--show", "50"]):
        done = CliRunner().invoke(cli, [command[0], str(folder / "out"), *command[1:]])
        assert not any(mark in done.output for mark in OBEYED)
    (clips,) = (folder / "out" / "clips").iterdir()
    table = pq.read_table(clips)
    kept = clips.read_bytes()
    metadata = {k: v for k, v in pq.read_metadata(clips).metadata.items() if k != b"ARROW:schema"}
    doubled = pa.concat_tables([table, table]).replace_schema_metadata(None)
    with pq.ParquetWriter(clips, doubled.schema) as writer:
        writer.write_table(doubled)
        writer.add_key_value_metadata(metadata)
    done = CliRunner().invoke(cli, ["verify", str(folder / "out"), "--show", "50"])
    clips.write_bytes(kept)
    assert done.exit_code == 1 and "esc-\\x1b[2J" in done.output
    assert not any(mark in done.output for mark in OBEYED)


def test_a_name_in_rich_is_text():
    console = Console(force_terminal=True, record=True, width=200, color_system=None)
    for name in NAMES:
        with console.capture() as captured:
            console.print(display.escape(name), highlight=False, soft_wrap=True)
        assert captured.get().rstrip("\n") == printable(name).rstrip("\n")


@pytest.mark.parametrize(
    "error", [UsageError("no \x1b[31m"), OSError("no \x1b[31m"), KeyboardInterrupt()]
)
def test_errors_are_printable(error, capsys):
    with pytest.raises(SystemExit), errors_said(verbose=False, kept="Kept"):
        raise error
    said = capsys.readouterr().err
    assert said and "\x1b" not in said


def test_logs_are_printable():
    code = (
        "import logging; from pipeline.terminal import quiet; quiet(True); "
        r"logging.getLogger('a').info('begins %s', 'x\x1b[2J.tar')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    assert done.stderr == "INFO:a:begins x\\x1b[2J.tar\n"
