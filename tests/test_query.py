"""`earmark query`: what it answers is what is in the files, and it only reads."""

import csv
import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from bench.stand_ins import CloudStorage, Faults
from pipeline import rows as formats
from pipeline.cli import cli
from pipeline.options import UsageError
from pipeline.rows import write_table
from pipeline.views import LabelRow, Labels, open_views, with_functions

ROOT = Path(__file__).parent.parent
THRESHOLD = 0.9
HOSTILE = "red\x1b[31m\x9b1m\u202egnp.wav"


def earmark(*arguments, code=0):
    done = CliRunner().invoke(cli, ["query", *map(str, arguments)])
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done


def answer(*arguments):
    """The rows of a query, as JSON has them."""
    return [
        json.loads(line) for line in earmark(*arguments, "--format", "jsonl").stdout.splitlines()
    ]


@pytest.fixture(scope="module")
def tags(tmp_path_factory, tiny_checkpoint, make_tar, encoded, noise):
    """An output with chunks: seven clips of two tars, one of them broken."""
    folder = tmp_path_factory.mktemp("query")
    clips = [(f"{n}.wav", encoded((0.1 + n) * noise(12_000 * (1 + n), seed=n))) for n in range(5)]
    make_tar(folder / "a.tar", clips[:3])
    broken = ("broken.ogg", b"OggS, but no more than that")
    make_tar(folder / "b.tar", [*clips[3:], broken, (HOSTILE, encoded(noise(16_000, seed=9)))])
    command = ["annotate", str(folder / "a.tar"), str(folder / "b.tar"), "--output"]
    command += [str(folder / "tags"), "--checkpoint", str(tiny_checkpoint)]
    done = CliRunner().invoke(cli, [*command, "--chunks", "--threshold", str(THRESHOLD)])
    assert done.exit_code == 0, done.output
    return folder / "tags"


@pytest.fixture(scope="module")
def rows(tags):
    files = sorted((tags / "clips").glob("*.parquet"))
    return pa.concat_tables(pq.read_table(file) for file in files).to_pylist()


@pytest.fixture(scope="module")
def fine(rows):
    return [row for row in rows if row["error"] is None]


@pytest.fixture(scope="module")
def labels(tags):
    return pq.read_table(tags / "labels.parquet").to_pylist()


@pytest.fixture(scope="module")
def mixed(fine, labels):
    """Two labels that some clips have as a tag and others do not; a name with a comma, if any."""
    both = [
        label
        for label in labels
        if 1 < sum(row["scores"][label["index"]] > THRESHOLD for row in fine) < len(fine) - 1
    ]
    return sorted(both, key=lambda label: "," not in label["name"])[:2]


def changed(tags, target, change):
    """A copy of an output whose tables went through `change`."""
    shutil.copytree(tags, target)
    for file in (target / "clips").iterdir():
        pq.write_table(change(pq.read_table(file)), file)
    return target


# ------------------------------------------------------------------------ SQL


def test_the_views_are_what_is_in_the_files(tags, rows, fine, labels):
    assert answer(tags, "SELECT clip_id FROM clips ORDER BY 1") == [
        {"clip_id": id} for id in sorted(row["clip_id"] for row in fine)
    ]
    assert answer(tags, "SELECT count(*) AS n FROM all_rows") == [{"n": len(rows)}]
    (failure,) = answer(tags, "FROM failures")
    assert failure["member"] == "broken.ogg" and failure["type"] == "InvalidDataError"
    assert failure["stage"] == "decode" and "scores" not in failure
    found = answer(tags, "FROM tags")
    assert found == [{"clip_id": row["clip_id"], **tag} for row in fine for tag in row["tags"]]
    found = answer(tags, "FROM chunks")
    assert len(found) > len(fine)
    assert found == [{"clip_id": row["clip_id"], **one} for row in fine for one in row["chunks"]]
    assert answer(tags, "FROM labels") == labels


def test_score_and_has_by_name_and_mid(tags, fine, labels, mixed):
    for label in [*mixed, labels[0]]:
        below = {row["name"] for row in labels if label["name"] in [row["name"], *row["ancestors"]]}
        for name in (label["name"], label["mid"]):
            name = name.replace("'", "''")
            sql = f"SELECT clip_id, score('{name}') AS s, c.score('{name}') AS t, has('{name}') AS h FROM clips AS c"
            for found, row in zip(answer(tags, sql), fine, strict=True):
                assert found["s"] == found["t"] == row["scores"][label["index"]]
                assert found["h"] == (not below.isdisjoint(tag["name"] for tag in row["tags"]))


def test_has_counts_what_is_below(tags, fine, labels):
    below = {row["name"] for row in labels if "Animal" in [row["name"], *row["ancestors"]]}
    expected = [not below.isdisjoint(tag["name"] for tag in row["tags"]) for row in fine]
    for name in ("Animal", "/m/0jbk"):
        found = [row["h"] for row in answer(tags, f"SELECT has('{name}') AS h FROM clips")]
        assert found == expected and any(found)
    assert answer(tags, "SELECT bool_or(has('Human sounds')) AS h FROM clips") == [{"h": True}]


def test_the_header_is_what_was_asked_for(tags):
    sql = "SELECT score('Dog'), c.score('Cat'), has('Animal'), c.has('Pets') FROM clips c"
    sql = sql.replace("Pets", "Domestic animals, pets")
    header = next(csv.reader(io.StringIO(earmark(tags, sql, "--format", "csv").stdout)))
    assert header == ["score('Dog')", "score('Cat')", "has('Animal')",
                      "has('Domestic animals, pets')"]  # fmt: skip


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SELECT score('Dog')", "SELECT <Dog>"),
        ("SELECT SCORE ( 'Dog' )+1", "SELECT <Dog>+1"),
        ('SELECT score("Dog")', "SELECT <Dog>"),
        ("SELECT score('it''s (a, \"b\")')", 'SELECT <it\'s (a, "b")>'),
        ("SELECT c.score('Dog'), s.c.has('Cat')", "SELECT c.<Dog>, [Cat|s.c.]"),
        ("SELECT has('Cat') AND NOT has('Dog');", "SELECT [Cat|] AND NOT [Dog|];"),
        ("SELECT 'é', score('Dög')", "SELECT 'é', <Dög>"),
        ("SELECT 'score(''Dog'')' -- score('Dog')", "SELECT 'score(''Dog'')' -- score('Dog')"),
        ("/* has('x') */ SELECT score FROM tags", "/* has('x') */ SELECT score FROM tags"),
        ('SELECT max(score), "has" FROM tags', 'SELECT max(score), "has" FROM tags'),
        ("", ""),
    ],
)
def test_functions_are_replaced_in_sql_alone(sql, expected):
    assert with_functions(sql, lambda x: f"<{x}>", lambda x: (f"[{x}|", "]")) == expected


@pytest.mark.parametrize(
    "call", ["score()", "score(name)", "score('a', 'b')", "has('a' || 'b')", "score("]
)
def test_a_function_takes_one_label_in_quotes(tags, call):
    assert "one label in quotes" in earmark(tags, f"SELECT {call} FROM clips", code=2).output


def test_an_unknown_label_is_told_with_the_nearest(tags):
    assert "did you mean 'Dog'" in earmark(tags, "SELECT score('dog') FROM clips", code=2).output
    assert "did you mean 'Siren'" in earmark(tags, "--tag", "Sirene>0.5", code=2).output
    assert "'Animal'" in earmark(tags, "--under", "Animals", code=2).output
    assert "group of labels" in earmark(tags, "SELECT score('Human sounds')", code=2).output
    assert "SELECT name FROM labels" in earmark(tags, "--tag", "qqqqq", code=2).output
    assert "columns are clip_id" in earmark(tags, "--sort", "xyz", code=2).output
    assert "cannot be understood" in earmark(tags, "--tag", "Dog>much", code=2).output


def test_labels_that_are_not_audiosets():
    own = Labels([LabelRow(0, None, "a", 0.5, ()), LabelRow(1, "x/1", "b", None, ())])
    assert own.find("x/1").name == "b" and own.below("x/1") == [1] and own.below("a") == [0]
    with pytest.raises(UsageError, match="there is no label 'c'"):
        own.find("c")


@pytest.mark.parametrize(
    "sql",
    [
        "COPY clips TO '{clips}/x.csv'",
        "COPY (SELECT 1) TO '{there}'",
        "EXPLAIN ANALYZE COPY (SELECT 1 AS x) TO '{there}'",
        "ATTACH '{clips}/x.db'",
        "EXPORT DATABASE '{clips}/x'",
        "CREATE TABLE x AS FROM clips",
        "DROP VIEW clips",
        "SET enable_external_access = true",
        "INSTALL httpfs",
        "SELECT 1; DROP VIEW clips",
        "FROM read_text('{run}')",
        "FROM read_parquet('{labels}')",
        "FROM glob('{clips}/*')",
        "SELECT nope FROM clips",
        "SELECT",
        "",
    ],
)
def test_a_query_only_reads_and_only_the_output(tags, sql):
    def state():
        files = sorted(file for file in tags.rglob("*") if file.is_file())
        return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    before = state()
    places = {"clips": tags / "clips", "there": min((tags / "clips").iterdir()),
              "run": tags / "run.json", "labels": tags / "labels.parquet"}  # fmt: skip
    earmark(tags, sql.format(**places), code=2)
    assert state() == before


def test_what_the_output_has_not_is_told(tags, tmp_path):
    said = earmark(tags, "SELECT count(*) FROM segments", code=2).output
    assert "has no segments: annotate with --segments" in said
    less = changed(tags, tmp_path / "less", lambda table: table.drop_columns("chunks"))
    for asked in (["FROM chunks"], ["--chunk", "--tag", "Dog"]):
        assert "has no chunks: annotate with --chunks" in earmark(less, *asked, code=2).output


def test_segments_and_clips_that_broke_off(tags, rows, tmp_path):
    one = {"index": 1, "mid": "m", "name": "n", "start_s": 0.5, "end_s": 1.0, "score": 0.75}
    kind = pa.list_(pa.struct([("index", pa.int16()), ("mid", pa.string()), ("name", pa.string()),
                               ("start_s", pa.float64()), ("end_s", pa.float64()),
                               ("score", pa.float32())]))  # fmt: skip

    def change(table):
        error = table.schema.field("error").type
        errors = [
            {"stage": "decode", "type": "Truncated", "message": "m"} if name == "0.wav" else value
            for name, value in zip(
                *(table[c].to_pylist() for c in ("member", "error")), strict=True
            )
        ]
        at = table.schema.get_field_index("error")
        table = table.set_column(at, "error", pa.array(errors, error))
        return table.append_column("segments", pa.array([[one]] * len(table), kind))

    output = changed(tags, tmp_path / "tags", change)
    found = answer(output, "FROM segments LIMIT 1")
    assert found == [{"clip_id": rows[0]["clip_id"], **one}]
    assert "0.wav" in {row["member"] for row in answer(output, "SELECT member FROM clips")}
    failed = answer(output, "SELECT member, type FROM failures ORDER BY member")
    assert failed == [{"member": "0.wav", "type": "Truncated"},
                      {"member": "broken.ogg", "type": "InvalidDataError"}]  # fmt: skip


# ---------------------------------------------------------------------- flags


def test_conditions(tags, fine, mixed):
    first, second = mixed
    ids = {row["clip_id"] for row in fine}

    def scored(label, test):
        return {row["clip_id"] for row in fine if test(np.float32(row["scores"][label["index"]]))}

    a, b = first["name"], second["name"]
    for asked, expected in [
        ([], ids),
        (["--tag", a], scored(first, lambda s: s >= np.float32(THRESHOLD))),
        # Above the threshold `tags` tells, below it `scores`.
        (["--tag", f"{a}>0.95"], scored(first, lambda s: s > np.float32(0.95))),
        (["--tag", f"{a} >= {THRESHOLD}"], scored(first, lambda s: s >= np.float32(THRESHOLD))),
        (["--tag", f"{a}<0.95"], scored(first, lambda s: s < np.float32(0.95))),
        (["--tag", f"{a}<={THRESHOLD}"], scored(first, lambda s: s <= np.float32(THRESHOLD))),
        (["--tag", f"{a}>3e-1"], scored(first, lambda s: s > np.float32(0.3))),
        (["--tag", f"{first['mid']}<0.3"], scored(first, lambda s: s < np.float32(0.3))),
        (["--tag", f"{a}>0.95", "--tag", f"{b}<0.5"],
         scored(first, lambda s: s > np.float32(0.95)) & scored(second, lambda s: s < 0.5)),
        (["--any", "--tag", f"{a}>0.95", "--tag", f"{b}>0.95"],
         scored(first, lambda s: s > np.float32(0.95)) | scored(second, lambda s: s > np.float32(0.95))),
    ]:  # fmt: skip
        found = [row["clip_id"] for row in answer(tags, *asked)]
        assert sorted(found) == sorted(expected), asked
    assert 0 < len(scored(first, lambda s: s > np.float32(0.95))) < len(ids)


def test_a_condition_above_the_threshold_leaves_the_scores_alone(tags, mixed):
    from pipeline.query import QueryOptions, sql_of

    name = mixed[0]["name"]
    with open_views(str(tags)) as views:
        sql = sql_of(QueryOptions(str(tags), tags=(f"{name}>0.95",), sort=name), views)
        assert "scores" not in sql
        sql = sql_of(QueryOptions(str(tags), tags=(f"{name}>0.85",)), views)
        assert "scores" in sql
        views.run["scoring"]["top_k"] = 3  # then a score may be high and no tag
        assert "scores" in sql_of(QueryOptions(str(tags), tags=(f"{name}>0.95",)), views)


def test_under(tags, fine, labels):
    below = {row["name"] for row in labels if "Music" in [row["name"], *row["ancestors"]]}
    expected = [row["clip_id"] for row in fine if below & {tag["name"] for tag in row["tags"]}]
    assert [row["clip_id"] for row in answer(tags, "--under", "Music")] == expected


def test_sort_limit_and_columns(tags, fine, mixed):
    label = mixed[0]
    by_score = sorted(fine, key=lambda row: -row["scores"][label["index"]])
    found = answer(tags, "--sort", label["name"], "--limit", 3)
    assert [row["clip_id"] for row in found] == [row["clip_id"] for row in by_score[:3]]
    assert found[0][label["name"]] == by_score[0]["scores"][label["index"]]
    found = answer(tags, "--sort", f"{label['name']} asc", "--columns", "member")
    assert found == [{"member": row["member"]} for row in by_score[::-1]]
    found = answer(tags, "--sort", "duration_s", "--columns", "duration_s, member")
    assert [row["duration_s"] for row in found] == sorted(row["duration_s"] for row in fine)
    name = "Male speech, man speaking"
    for columns in (["--columns", name], ["--columns", f'member, "{name}"']):
        assert list(answer(tags, *columns, "--limit", 1)[0])[-1] == name


def test_chunks_by_their_own_scores(tags, fine, mixed):
    label = mixed[0]
    expected = {
        (row["clip_id"], one["start_s"])
        for row in fine for one in row["chunks"]
        if one["scores"][label["index"]] >= np.float32(THRESHOLD)
    }  # fmt: skip
    for condition in (label["name"], f"{label['name']}>={THRESHOLD}"):
        found = answer(tags, "--chunk", "--tag", condition)
        assert {(row["clip_id"], row["start_s"]) for row in found} == expected and expected
    found = answer(tags, "--chunk", "--under", label["name"])
    assert {(row["clip_id"], row["start_s"]) for row in found} >= expected


def test_sql_and_flags_exclude_each_other(tags):
    assert "SQL says itself" in earmark(tags, "FROM clips", "--tag", "Dog", code=2).output
    assert "--chunk beside SQL" in earmark(tags, "FROM clips", "--chunk", code=2).output
    assert "--billing-project" in earmark(tags, "--billing-project", "p", code=2).output


# -------------------------------------------------------------------- formats


def test_the_formats_are_those_of_the_program():
    format_ = next(p for p in cli.commands["query"].params if p.name == "format_")
    assert tuple(format_.type.choices) == formats.FORMATS


def test_each_format_has_the_same_rows(tags, fine, tmp_path):
    sql = "SELECT clip_id, duration_s, tags, codec FROM clips"
    assert "Wrote 6 rows" in earmark(tags, sql, "--to", tmp_path / "x.parquet").stderr
    table = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert table == [{name: row[name] for name in table[0]} for row in fine]
    assert answer(tags, sql) == table
    earmark(tags, sql, "--to", tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as stream:
        found = list(csv.DictReader(stream))
    assert [row["clip_id"] for row in found] == [row["clip_id"] for row in fine]  # as they are
    assert [json.loads(row["tags"]) for row in found] == [row["tags"] for row in fine]
    out = subprocess.run(
        [sys.executable, "-m", "pipeline", "query", str(tags), sql, "--format", "parquet"],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert pq.read_table(io.BytesIO(out)).to_pylist() == table
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.csv", "x.parquet"]


def test_limit_holds_for_every_format(tags, tmp_path):
    for format_ in ("csv", "jsonl", "parquet"):
        earmark(tags, "FROM tags", "--limit", 2, "--to", tmp_path / f"x.{format_}")
    assert pq.read_metadata(tmp_path / "x.parquet").num_rows == 2
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 3
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == 2


def test_a_file_is_whole_or_not_there(tags, tmp_path):
    earmark(tags, "SELECT clip_id, error('no') FROM clips", "--to", tmp_path / "x.csv", code=2)
    assert not list(tmp_path.iterdir())
    assert "suffix" in earmark(tags, "--to", tmp_path / "x.xls", code=2).output
    assert "cannot be written" in earmark(tags, "--to", tmp_path / "no" / "x.csv", code=2).output
    for inside in (tags / "x.csv", tags / "clips" / ".." / "x.csv", tags / "run.json"):
        said = earmark(tags, "--to", inside, "--format", "csv", code=2).output
        assert "inside of OUTPUT" in said
    twice = earmark(tags, "SELECT 1 AS x, 2 AS x", "--format", "jsonl", code=2).output
    assert "two columns are called 'x'" in twice


@pytest.mark.parametrize("option", ["--extract", "--to", "--columns", "--sort"])
def test_an_empty_value_is_refused(tags, option):
    done = CliRunner().invoke(cli, ["query", str(tags), option, ""])
    assert done.exit_code == 2 and f"{option} is empty" in done.output


def test_a_score_is_from_0_to_1(tags, mixed):
    done = CliRunner().invoke(cli, ["query", str(tags), "--tag", f"{mixed[0]['name']}>1.5"])
    assert done.exit_code == 2 and "a score is from 0 to 1, 1.5 is not" in done.output


def test_a_pipe_gets_whole_ids(tags, fine, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    shown = earmark(tags, "SELECT clip_id, tags FROM clips").stdout
    assert all(row["clip_id"] in shown for row in fine if row["clip_id"].isascii())


def test_a_table_in_a_pipe_loses_no_column_and_little_text(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    long = "shard-00000/some/long/folder/name/clip-0001.flac"
    write_table(["clip_id", "duration_s", "tags"], [(long, 10.0, "Speech 0.91, " * 9)], None)
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["clip_id", "duration_s", "tags"]
    assert long in row and " 10 " in row and row.count("Speech 0.91") >= 8


def test_the_table_fits_and_names_are_escaped(tags, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    shown = earmark(tags, "--sort", "member desc").stdout
    assert max(map(len, shown.splitlines())) <= 60
    wide = earmark(
        tags, "SELECT member, 'x' || chr(27) || ']0;y' AS \"a\x1b[2J\" FROM clips"
    ).stdout
    for mark in ("\x1b", "\x9b", "\u202e"):
        assert mark not in shown + wide
    assert r"red\x1b[31m\x9b1m\u202egnp.wav" in wide and r"a\x1b[2J" in wide
    lines = earmark(tags, "SELECT member FROM clips", "--format", "jsonl").stdout
    assert "\x9b" not in lines and HOSTILE in {
        json.loads(line)["member"] for line in lines.splitlines()
    }


def test_a_long_table_is_cut_and_says_so(tags, monkeypatch):
    monkeypatch.setattr(formats, "TABLE_ROWS", 2)
    done = earmark(tags)
    assert len(done.stdout.splitlines()) == 3 and "The first 2 rows" in done.stderr
    assert len(earmark(tags, "--limit", 4).stdout.splitlines()) == 5
    assert "No row" in earmark(tags, "SELECT 1 WHERE false").stderr


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0.123456789, "0.123457"),
        (True, "true"),
        (float("-inf"), "-inf"),
        ([{"index": 1, "mid": "m", "name": "Dog", "score": 0.5}], "Dog 0.50"),
        ([{"name": "Dog", "start_s": 1.5, "end_s": 2.0, "score": 0.5}], "Dog 0.50 1.5-2 s"),
        ({"stage": "read", "type": "Link", "message": "m"}, "read/Link: m"),
        ([0.5, 1.0], "0.5, 1"),
    ],
)
def test_cells(value, text):
    assert formats.cell(value) == text


# ------------------------------------------------------------ where it may lie


def test_an_output_without_rows_and_one_that_is_being_written(tags, tmp_path):
    output = tmp_path / "it's [1] * ?"
    output.mkdir()
    for name in ("run.json", "labels.parquet"):
        shutil.copy(tags / name, output)
    assert answer(output, "SELECT count(*) AS n, max(score('Dog')) AS s FROM clips") == [
        {"n": 0, "s": None}
    ]
    assert answer(output, "FROM tags") == [] and answer(output, "--tag", "Dog>0.5") == []
    (output / "clips").mkdir()
    first, second = sorted((tags / "clips").iterdir())
    shutil.copy(first, output / "clips")
    shutil.copy(second, output / "clips" / f".{second.stem}.host.1.0123abcd.partial")
    shutil.copy(second, output / "clips" / ".hidden.parquet")
    assert answer(output, "SELECT count(*) AS n FROM clips") == [{"n": 3}]


def test_what_is_no_output_is_told(tags, tmp_path):
    assert "no run.json" in earmark(tmp_path, code=2).output
    assert "no run.json" in earmark(tmp_path / "nowhere", code=2).output
    assert "cannot be read" in earmark(tags / "run.json", code=2).output
    assert "OUTPUT is empty" in earmark("", code=2).output
    copy = tmp_path / "tags"
    shutil.copytree(tags, copy)
    damaged = min((copy / "clips").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-200])
    assert damaged.name in earmark(copy, "SELECT count(*) FROM clips", code=1).output
    (copy / "labels.parquet").write_bytes(b"PAR1")
    assert "labels.parquet is damaged" in earmark(copy, code=2).output
    (copy / "run.json").write_text("{}")
    assert "run.json is damaged" in earmark(copy, code=2).output


def test_in_a_bucket(tags, fine, mixed, lead_to):
    with CloudStorage("b") as cloud:
        lead_to(cloud.env)
        for file in tags.rglob("*"):
            if file.is_file():
                cloud.put("b", f"tags/{file.relative_to(tags)}", file.read_bytes())
        cloud.faults = Faults(rate=0.1, kinds=("503", "reset", "short"), seed=1)
        name = mixed[0]["name"]
        for asked in (
            ["--tag", f"{name}>0.95", "--sort", name],
            ["FROM tags"],
            ["--tag", f"{name}<0.5"],
        ):
            assert answer("gs://b/tags", *asked) == answer(tags, *asked)
        assert cloud.faults.counts  # requests failed, and were made again
        there = cloud.names("b")
        earmark("gs://b/tags", "COPY clips TO 'gs://b/tags/clips/x.parquet'", code=2)
        earmark("gs://b/tags", "COPY clips TO 'earmark://clips/x.parquet'", code=2)
        assert cloud.names("b") == there


def test_a_reader_that_has_enough_and_ctrl_c(tags):
    command = [sys.executable, "-m", "pipeline", "query", str(tags), "--format", "csv"]
    many = "SELECT range, repeat('x', 100) AS x FROM range(1000000)"
    with subprocess.Popen([*command, many], cwd=ROOT, stdout=-1, stderr=-1) as running:
        assert running.stdout.readline() == b"range,x\n"
        running.stdout.close()
        assert running.stderr.read() == b"" and running.wait(60) == 0

    endless = (
        "SELECT count(*) FROM range(10000000) a, range(10000000) b WHERE a.range % 7 < b.range"
    )
    with subprocess.Popen(
        [*command, endless], cwd=ROOT, stdout=-1, stderr=-1, preexec_fn=heeds_ctrl_c
    ) as running:
        try:
            time.sleep(3)
            assert running.poll() is None
            running.send_signal(signal.SIGINT)
            assert running.wait(30) == 130
            assert running.stderr.read() == b"Stopped. Nothing was changed.\n"
        finally:
            running.kill()  # else the `with` would wait for it


def heeds_ctrl_c():
    """What a shell starts in the background inherits that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
