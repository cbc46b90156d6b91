"""docs/questions.md: ten questions, and every engine gives the same answer on a real output."""

import json
import re
import shlex
from pathlib import Path

import datasets
import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlglot
from click.testing import CliRunner
from sqlglot import exp

from pipeline.cli import cli

DOCUMENT = (Path(__file__).parent.parent / "docs" / "questions.md").read_text("utf-8")
PYTHON = ("polars", "pandas", "pyarrow", "datasets")
ENGINES = ("earmark", "duckdb", *PYTHON, "bigquery")
SECTIONS = re.split(r"^## \d+\. ", DOCUMENT, flags=re.MULTILINE)


def block(section, engine):
    """What a section has for an engine; None where it has nothing."""
    if engine == "earmark":
        found = re.findall(r"```console\n\$ (.*?)\n```", section, flags=re.DOTALL)
    else:
        found = re.findall(rf"```(?:sql|python) {engine}\n(.*?)```", section, flags=re.DOTALL)
    assert len(found) <= 1
    return found[0] if found else None


def test_ten_questions_in_every_engine():
    assert len(SECTIONS) == 11
    for section in SECTIONS[1:]:
        assert all(block(section, engine) for engine in ENGINES), section
    assert all(block(SECTIONS[0], engine) for engine in ("duckdb", *PYTHON))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_checkpoint, make_tar, encoded, noise):
    """A folder with an output `tags` of seven clips, two of them equal and one failed."""
    folder = tmp_path_factory.mktemp("questions")
    clips = [
        (f"{n}.wav", encoded((0.2 + n) * noise(16_000 * (1 + n), seed=n), subtype="FLOAT"))
        for n in range(5)
    ]
    again = ("again.wav", clips[1][1])
    make_tar(folder / "a.tar", clips[:3])
    make_tar(folder / "b.tar", [*clips[3:], again, ("broken.ogg", b"OggS, but no more than that")])
    command = ["annotate", str(folder / "a.tar"), str(folder / "b.tar"), "--output"]
    command += [str(folder / "tags"), "--checkpoint", str(tiny_checkpoint), "--threshold", "0.7"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    files = sorted((folder / "tags" / "clips").iterdir())
    return pa.concat_tables(pq.read_table(file) for file in files).to_pylist()


@pytest.fixture(scope="module")
def named(folder, rows):
    """Puts labels about which the output has something to say in the place of the page's."""
    labels = pq.read_table(folder / "tags" / "labels.parquet").to_pylist()
    fine = [row for row in rows if row["error"] is None]

    def share(label, above):
        return sum(row["scores"][label["index"]] > above for row in fine) / len(fine)

    plain = [label for label in labels if re.fullmatch(r"[A-Z][a-z]+", label["name"])]
    siren = next(label for label in plain if 0 < share(label, 0.7) < share(label, 0.5) <= 1)
    speech, music = next(
        (s, m) for s in plain for m in plain
        if 0 < sum(r["scores"][s["index"]] > 0.5 and r["scores"][m["index"]] < 0.2 for r in fine) < 6
    )  # fmt: skip
    below = {
        up: [row["name"] for row in labels if up in (row["name"], *row["ancestors"])]
        for label in plain for up in [label["name"]]
    }  # fmt: skip
    tagged = [{tag["name"] for tag in row["tags"]} for row in fine]
    animal = next(
        up for up, names in below.items()
        if len(names) > 3 and 0 < sum(not t.isdisjoint(names) for t in tagged) < len(fine)
    )  # fmt: skip
    names = {
        "Siren": siren["name"],
        "Speech": speech["name"],
        "Music": music["name"],
        "Animal": animal,
    }
    return lambda text: re.sub("|".join(names), lambda match: names[match.group()], text)


def comparable(answer):
    """Tuples of plain values; numbers to six digits, since sums come in another order."""

    def plain(value):
        value = value.item() if hasattr(value, "item") else value
        return float(f"{value:.6g}") if isinstance(value, float) else value

    return [tuple(map(plain, row)) for row in answer]


def in_duckdb(bigquery):
    tree = sqlglot.parse_one(bigquery, read="bigquery")
    for bracket in tree.find_all(exp.Bracket):
        # sqlglot counts a literal index from 1, but leaves one that is a column as it is.
        bracket.set("expressions", [exp.Add(this=i, expression=exp.Literal.number(1))
                                    for i in bracket.expressions])  # fmt: skip
    return tree.sql(dialect="duckdb")


@pytest.fixture(scope="module")
def ask(folder, named):
    """Asks a question in the words of an engine: rows as tuples."""
    prepared = {}

    def run(engine, section):
        code = named(block(section, engine))
        if engine == "earmark":
            done = CliRunner().invoke(cli, [*shlex.split(code)[1:], "--format", "jsonl"])
            assert done.exit_code == 0, done.output
            return [tuple(json.loads(line).values()) for line in done.stdout.splitlines()]
        if engine in ("duckdb", "bigquery"):
            with duckdb.connect() as connection:
                connection.execute(block(SECTIONS[0], "duckdb"))
                if engine == "bigquery":
                    connection.execute("CREATE SCHEMA earmark")
                    for table in ("clips", "labels"):
                        connection.execute(f"CREATE VIEW earmark.{table} AS FROM main.{table}")
                    code = in_duckdb(code)
                return connection.sql(code).fetchall()
        if engine not in prepared:
            prepared[engine] = {}
            datasets.config.HF_DATASETS_CACHE = folder / "cache"
            exec(block(SECTIONS[0], engine), prepared[engine])
        names = dict(prepared[engine])
        exec(code, names)
        return names["answer"]

    return run


@pytest.mark.parametrize("number", range(1, 11))
def test_every_engine_gives_the_same_answer(number, ask, folder, monkeypatch):
    pytest.importorskip("polars")
    monkeypatch.chdir(folder)
    answers = {engine: comparable(ask(engine, SECTIONS[number])) for engine in ENGINES}
    assert answers["earmark"]
    for engine, answer in answers.items():
        assert answer == answers["earmark"], engine


def test_an_output_without_failures_has_none():
    pytest.importorskip("pandas")
    import pandas as pd

    names = {"pd": pd, "clips": pd.DataFrame({"error": [None, None]})}
    exec(block(SECTIONS[6], "pandas"), names)
    assert names["answer"] == []


def test_the_answers_are_right(ask, folder, rows, named, monkeypatch):
    monkeypatch.chdir(folder)
    failed = [row for row in rows if row["error"] is not None]
    assert ask("earmark", SECTIONS[1]) == [(len(rows), len(failed))] == [(7, 1)]
    siren = named("Siren")
    expected = [(row["clip_id"], tag["score"]) for row in rows for tag in row["tags"] or ()
                if tag["name"] == siren]  # fmt: skip
    assert ask("earmark", SECTIONS[3]) == sorted(expected, key=lambda row: (-row[1], row[0]))
    twice = {row["audio_xxh128"] for row in rows if row["member"] in ("1.wav", "again.wav")}
    assert ask("earmark", SECTIONS[9]) == [(twice.pop(), 2)] and not twice
