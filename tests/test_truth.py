"""What is true of which clip, in the forms that people keep it in, and how clips meet rows."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluation.scores import NAME_KINDS, EvaluationError, join, match, names_of, open_source
from evaluation.truth import (
    groups_of,
    known_names,
    parse_labels,
    read_stated_truth,
    read_truth,
    resolve,
    segment_names,
)
from student.labels import Label, audioset_labels

LABELS = (
    Label(0, "/m/0bt9lr", "Dog"),
    Label(1, "/m/01yrx", "Cat"),
    Label(2, "/m/068hy", "Domestic animals, pets"),
    Label(3, "", "Kettle; whistling"),
)
KNOWN = known_names(LABELS)


@pytest.fixture
def write_output(tmp_path):
    """Writes what `earmark annotate` would: rows of (member, scores or error, other columns)."""

    def write(rows, name="out", labels=LABELS, columns=(), **summary):
        folder = tmp_path / name
        (folder / "clips").mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"checkpoint": {"name": name}}))
        (folder / "summary.json").write_text(json.dumps(summary))
        table = [{"index": x.index, "mid": x.mid or None, "name": x.name} for x in labels]
        pq.write_table(pa.Table.from_pylist(table), folder / "labels.parquet")
        by_shard = {}
        for row in rows:
            by_shard.setdefault(row.get("shard", "a"), []).append(row)
        for shard, of_shard in by_shard.items():
            full = []
            for row in of_shard:
                failed = row.get("error")
                scores = [None] * len(labels) if failed else row["scores"]
                full.append(
                    {
                        "clip_id": f"{shard}/{row['member']}",
                        "member": row["member"],
                        "audio_xxh128": row.get("hash"),
                        "scores": scores,
                        "metadata": json.dumps(row["metadata"]) if "metadata" in row else None,
                        "tags": row.get("tags"),
                        "error": {"stage": "decode", "type": failed, "message": "m"}
                        if failed
                        else None,
                    }
                )
            tag = pa.struct([("mid", pa.string()), ("name", pa.string())])
            error = pa.struct([(n, pa.string()) for n in ("stage", "type", "message")])
            schema = pa.schema(
                [
                    ("clip_id", pa.string()),
                    ("member", pa.string()),
                    ("audio_xxh128", pa.string()),
                    ("scores", pa.list_(pa.float32(), len(labels))),
                    ("metadata", pa.string()),
                    ("tags", pa.list_(tag)),
                    ("error", error),
                ]
            )
            pq.write_table(
                pa.Table.from_pylist(full, schema), folder / "clips" / f"{shard}.parquet"
            )
        return str(folder)

    return write


def row(member, *scores, **more):
    return {"member": member, "scores": list(scores or (0.1, 0.2, 0.3, 0.4)), **more}


@pytest.fixture
def source(write_output):
    return open_source(write_output([row("x/dog.wav", metadata={"a": {"b": ["Dog"]}})]))


# ------------------------------------------------------------------ labels in a cell


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ("Dog", ["Dog"]),
        ("/m/0bt9lr,/m/01yrx", ["/m/0bt9lr", "/m/01yrx"]),
        ("/m/0bt9lr /m/01yrx", ["/m/0bt9lr", "/m/01yrx"]),
        ("Domestic animals, pets", ["Domestic animals, pets"]),
        ("Dog, Domestic animals, pets,Cat", ["Dog", "Domestic animals, pets", "Cat"]),
        ("Dog;Domestic animals, pets", ["Dog", "Domestic animals, pets"]),
        ("Dog|Kettle; whistling|Cat", ["Dog", "Kettle; whistling", "Cat"]),
        ('["Dog", "a, b"]', ["Dog", "a, b"]),
        ("['Dog', 'Cat']", ["Dog", "Cat"]),
        (["Dog", "neither, nor"], ["Dog", "neither, nor"]),
        (np.array(["Dog", "Dog"]), ["Dog"]),
        ([{"mid": "/m/0bt9lr", "name": "Dog"}, {"mid": None, "name": "Cat"}], ["/m/0bt9lr", "Cat"]),
        ("Dog, Wolf", ["Dog", "Wolf"]),
        ("domestic animals, pets", ["domestic animals, pets"]),
        ("dog,DOMESTIC ANIMALS, PETS;cat", ["dog", "DOMESTIC ANIMALS, PETS", "cat"]),
        ('{"name": "Dog"}', ["Dog"]),
        ("{'Dog'}", ["Dog"]),
        ("[{[]:1}]", ["[{[]:1}]"]),
        ("[unclear", ["[unclear"]),
        ("", []),
        (" ; ", []),
        (None, []),
        (float("nan"), []),
    ],
)
def test_labels_of_a_cell(cell, labels):
    assert parse_labels(cell, KNOWN) == tuple(labels)


def test_all_names_of_audioset_survive_being_listed():
    names = [label.name for label in audioset_labels()]
    for separator in (",", ", ", ";", "|", "\t"):
        assert parse_labels(separator.join(names), known_names(())) == tuple(names)


def test_brackets_without_end_are_a_text():
    deep = "[" * 9_999 + "]" * 9_999
    assert parse_labels(deep, KNOWN) == (deep,)


@pytest.mark.parametrize(
    "cell",
    [
        {"Dog": 0.9, "Cat": 0.1},
        '{"Dog": 0.9}',
        [{"Dog": 1}],
        {"mid": None, "name": float("nan")},
        {},
    ],
)
def test_an_object_that_names_no_label_is_refused(cell):
    with pytest.raises(EvaluationError, match="without mid, name or label; expected a list"):
        parse_labels(cell, KNOWN)


# ------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'clip_id,labels\nx/dog.wav,"Dog,Cat"\nb,\n'),
        ("t.csv", "\ufeffFile;Label\nx/dog.wav;Dog\nb;\nx/dog.wav;Cat\n"),
        ("t.tsv", "other\tfilename\tmids\n1\tx/dog.wav\t/m/0bt9lr,/m/01yrx\n2\tb\t\n"),
        (
            "t.jsonl",
            '{"path": "x/dog.wav", "tags": [{"mid": "/m/0bt9lr"}, {"name": "Cat"}]}\n'
            '{"path": "b", "tags": []}\n',
        ),
    ],
)
def test_tables(tmp_path, source, name, text):
    file = tmp_path / name
    file.write_text(text, "utf-8")
    truth = read_truth(str(file), source)
    assert truth.clips == ("x/dog.wav", "b")
    matrix = resolve(truth, LABELS).matrix
    assert matrix.tolist() == [[True, True, False, False], [False] * 4]


def test_a_parquet_table_and_named_columns(tmp_path, source):
    file = str(tmp_path / "t.parquet")
    pq.write_table(
        pa.table({"id": ["a"], "what": ["x/dog.wav"], "is": [["Dog"]], "labels": ["x"]}), file
    )
    truth = read_truth(file, source, clip_column="what", label_column="is")
    assert (truth.clips, truth.labels) == (("x/dog.wav",), (("Dog",),))


def test_a_null_does_not_say_and_an_empty_cell_says_nothing_is_true(tmp_path, source):
    file = tmp_path / "t.jsonl"
    file.write_text(
        '{"id": "a", "labels": null}\n{"id": "b", "labels": []}\n{"id": "c"}\n'
        '{"id": "d", "labels": NaN}\n'
    )
    truth = read_truth(str(file), source)
    assert (truth.clips, truth.labels, truth.without) == (("b",), ((),), 3)


def test_a_null_in_the_metadata_does_not_say_either(write_output):
    stated = [{"a": None}, {"a": "Dog"}, {"a": float("nan")}, {"b": 1}, {"a": ""}]
    rows = [row(f"{n}.wav", metadata=metadata) for n, metadata in enumerate(stated)]
    truth = read_truth("metadata:a", open_source(write_output(rows)))
    assert (truth.clips, truth.labels, truth.without) == (("a/1.wav", "a/4.wav"), (("Dog",), ()), 2)


def test_groups_of_a_value_and_clips_without_one(write_output):
    values = [{"r": 1}, {"r": "1"}, {"r": "a/3.wav"}, {}, {"r": None}]
    rows = [row(f"{n}.wav", metadata=metadata) for n, metadata in enumerate(values)]
    source = open_source(write_output([*rows, row("5.wav", metadata={"r": 2})]))
    asked = [f"a/{n}.wav" for n in range(5)]
    groups, without = groups_of(source, "r", asked)
    # The value of clip 2 is spelt as the id of clip 3, and clip 5 was not asked for.
    assert groups[0] == groups[1] and len(set(groups)) == 4
    assert without == 2
    with pytest.raises(EvaluationError, match=r"none of the 1 compared clips of .* has 'r'"):
        groups_of(source, "r", asked[3:4])


SEGMENTS = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=2, num_segs=2, num_unique_labels=3, num_positive_labels=3
# YTID, start_seconds, end_seconds, positive_labels
--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/0bt9lr"
-0xzrMun0Rs, 30.000, 40.000, "/m/01yrx"
"""


@pytest.mark.parametrize(
    "text",
    [
        SEGMENTS,
        "YTID,start_seconds,end_seconds,positive_labels\n" + SEGMENTS.partition("labels\n")[2],
    ],
)
@pytest.mark.parametrize(
    "member",
    ["--4gqARaEJE.flac", "eval/Y--4gqARaEJE.wav", "--4gqARaEJE_0_10.wav", "--4gqARaEJE_0.000_10.000.m4a",
     "--4gqARaEJE_0_10000.wav", "--4gqARaEJE_000000.mp4"],
)  # fmt: skip
def test_audiosets_segments_meet_files_as_people_name_them(tmp_path, write_output, text, member):
    file = tmp_path / "eval_segments.csv"
    file.write_text(text)
    source = open_source(write_output([row(member)]))
    truth = read_truth(str(file), source)
    assert truth.labels == (("/m/068hy", "/m/0bt9lr"), ("/m/01yrx",))
    assert match(source, truth.names).clips.tolist() == [0]


def test_two_segments_of_a_video_are_told_apart_by_their_times(write_output):
    names = [segment_names("abcdefghijk", 0, 10), segment_names("abcdefghijk", 30, 40)]
    told = open_source(write_output([row("abcdefghijk_30000_40000.wav")], "told"))
    assert match(told, names).clips.tolist() == [1]
    untold = open_source(write_output([row("abcdefghijk.wav")], "untold"))
    with pytest.raises(EvaluationError, match=r"more than one clip.*'abcdefghijk', which fits 2"):
        match(untold, names)


def test_a_truth_in_the_metadata(source, write_output):
    truth = read_truth("metadata:a.b", source)
    assert (truth.clips, truth.labels) == (("a/x/dog.wav",), (("Dog",),))
    some = open_source(
        write_output([row("1.wav", metadata={"c": "Dog,Cat"}), row("2.wav")], "some")
    )
    truth = read_truth("metadata:c", some)
    assert truth.labels == (("Dog", "Cat"),)


def test_a_truth_that_is_another_output(write_output, source):
    rows = [
        row("1.wav", 0.9, 0.3, 0.29, 0, tags=[{"mid": "/m/0bt9lr", "name": "Dog"}]),
        row("2.wav", error="NoAudio"),
        row("3.wav", 0, 0, 0, 0.5, tags=[{"mid": None, "name": "Kettle; whistling"}]),
    ]
    teacher = write_output(rows, "teacher")
    tags = read_truth(teacher, source)
    assert (tags.labels, tags.without) == ((("/m/0bt9lr",), ("Kettle; whistling",)), 1)
    scores = read_truth(teacher, source, threshold=0.3)
    assert scores.labels == (("/m/0bt9lr", "/m/01yrx"), ("Kettle; whistling",))


def test_a_truth_that_is_a_file_of_scores(tmp_path, source):
    file = str(tmp_path / "teacher.parquet")
    scores = np.array([[0.31, 0.29, 0, 0]], np.float16)
    column = pa.FixedSizeListArray.from_arrays(pa.array(scores.ravel()), 4)
    pq.write_table(pa.table({"clip_id": ["dog"], "scores": column}), file)
    truth = read_truth(file, source)
    assert truth.labels == (("/m/0bt9lr",),)
    assert match(source, truth.names).joined_by == {"file name without suffix": 1}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("no.csv", "clip,labels\n1,Dog\n", "columns clip, labels, none of clip_id, id.*--clip-column"),
        ("no.csv", "id,what\n1,Dog\n", "columns id, what, none of mids.*--label-column"),
        ("no.csv", "", "is empty"),
        ("no.csv", "id,labels\n,Dog\n", "no row with both a clip in column 'id' and labels"),
        ("no.csv", "id,labels\na,Dog\n\nb,Dog,Cat\n", "line 4 has 3 cells, the header 2 .*'b,Dog,Cat'. Put quotes"),
        ("no.csv", 'id,labels\na,Dog\nb,"Dog\nc,Cat\nd,Cat\n', "begins in line 3 cannot be read.*a quote not closed"),
        ("no.jsonl", '{"id": "a", "labels": {"Dog": 0.9}}', "clip 'a': .*'Dog': 0.9.* without mid"),
        ("no.jsonl", '{"id": 1}\n{"id": \n', "line 2 is no JSON"),
        ("no.jsonl", "[1]\n", "line 1 is no JSON object"),
        ("no.csv", SEGMENTS + "abc, x, 10.0, y\n", "segment 3 is 'abc,x,10.0,y'; expected"),
        ("no.parquet", "PAR1 and no more", "cannot be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said(tmp_path, source, name, text, said):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(EvaluationError, match=said):
        read_truth(str(file), source)


def test_a_cell_too_long_for_the_csv_module_is_said(tmp_path, source):
    for beginning, line in (("id,labels\na,", 2), (SEGMENTS + 'abc, 0, 10, "', 6)):
        file = tmp_path / "t.csv"
        file.write_text(beginning + "x" * 140_000)
        with pytest.raises(EvaluationError, match=rf"begins in line {line} .*field larger"):
            read_truth(str(file), source)


def test_what_is_not_there_is_said(tmp_path, source):
    with pytest.raises(EvaluationError, match=r"nowhere.csv' cannot be read: No such file"):
        read_truth(str(tmp_path / "nowhere.csv"), source)
    with pytest.raises(EvaluationError, match=r"has no run\.json; expected the folder"):
        read_truth(str(tmp_path / "nowhere"), source)
    with pytest.raises(
        EvaluationError, match=r"no row of .* has a value of this field .*\(it has a\)"
    ):
        read_truth("metadata:labels", source)
    file = tmp_path / "t.csv"
    file.write_text("id,labels\na,Dog\n")
    with pytest.raises(EvaluationError, match="not 'clip'; name the right one with --clip-column"):
        read_truth(str(file), source, clip_column="clip")
    with pytest.raises(EvaluationError, match="--truth-threshold is of scores"):
        read_truth(str(file), source, threshold=0.5)
    with pytest.raises(EvaluationError, match="--clip-column and --label-column are of a table"):
        read_truth("metadata:a", source, clip_column="a")
    segments = tmp_path / "segments.csv"
    segments.write_text(SEGMENTS)
    for stated in ("metadata:a.b", str(segments)):
        with pytest.raises(EvaluationError, match="--truth-threshold is of scores"):
            read_truth(stated, source, threshold=0.5)


def test_a_row_of_a_table_may_end_in_empty_cells(tmp_path, source):
    file = tmp_path / "t.csv"
    file.write_text('id,labels\na,Dog,,\nb\nc,"Dog, ""Cat"""\n')
    truth = read_truth(str(file), source)
    assert (truth.clips, truth.labels) == (("a", "c"), (("Dog",), ("Dog", "Cat")))
    assert truth.without == 1


def test_a_column_of_maps_is_refused(tmp_path, source):
    file = str(tmp_path / "t.parquet")
    maps = pa.array([[("Dog", 0.9)]], pa.map_(pa.string(), pa.float32()))
    pq.write_table(pa.table({"id": ["a"], "labels": maps}), file)
    with pytest.raises(EvaluationError, match=r"column 'labels' is map.*expected text or a list"):
        read_truth(file, source)


def test_what_is_stated_can_be_read_before_there_are_scores(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("id,labels\na,Dog\n")
    assert read_stated_truth(str(file), LABELS).clips == ("a",)
    assert read_stated_truth("metadata:a", LABELS) is None


# ------------------------------------------------------------------ labels of a checkpoint


def truth_of(tmp_path, source, *cells):
    file = tmp_path / "truth.jsonl"
    lines = [json.dumps({"id": str(number), "labels": cell}) for number, cell in enumerate(cells)]
    file.write_text("\n".join(lines))
    return read_truth(str(file), source)


def test_labels_are_known_by_mid_by_name_and_by_audiosets_name_for_the_mid(tmp_path, source):
    own = (Label(0, "/m/0bt9lr", "hound"), Label(1, "", "Cat"))
    truth = truth_of(
        tmp_path,
        source,
        ["/m/0bt9lr"],
        ["hound"],
        ["Dog"],
        ["HOUND"],
        ["dog"],
        ["/m/01yrx"],
        ["cat"],
        [],
    )
    matrix = resolve(truth, own).matrix
    assert matrix.tolist() == [[True, False]] * 5 + [[False, True]] * 2 + [[False, False]]


def test_unknown_labels_are_counted_and_only_unknown_ones_refused(tmp_path, source):
    truth = truth_of(tmp_path, source, ["Dog", "Wolf"], ["Wolf"], ["Fox"])
    assert resolve(truth, LABELS).unknown == {"Wolf": 2, "Fox": 1}
    truth = truth_of(tmp_path, source, ["Dogs"], ["Qwerty"])
    with pytest.raises(
        EvaluationError, match=r"none of the 2 labels .*'Dogs' \(nearest: 'Dog'\); 'Qwerty'"
    ):
        resolve(truth, LABELS)


# ------------------------------------------------------------------ clips meet rows


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a/x/dog.wav", "clip_id"),
        ("x/dog.wav", "member"),
        ("dog.wav", "file name"),
        ("/data/x/dog.wav", "file name"),
        ("dog", "file name without suffix"),
        ("dog.flac", "file name without suffix"),
        ("x/dog.flac", "file name without suffix"),
        ("data/x/dog", "file name without suffix"),
    ],
)
def test_a_clip_meets_its_row_by_the_most_exact_name(source, name, kind):
    matched = match(source, [names_of("other"), names_of(name)])
    assert matched.clips.tolist() == [1]
    assert matched.clip_ids == ("a/x/dog.wav",)
    assert matched.joined_by == {kind: 1}


@pytest.mark.parametrize(
    "name", ["y/dog.wav", "a/y/dog.wav", "y/dog", "x/y/dog.wav", "xx/dog.wav", "g.wav"]
)
def test_clips_in_other_folders_are_other_clips(source, name):
    assert len(match(source, [names_of(name)]).clips) == 0


def test_a_dot_in_a_name_is_not_a_suffix(write_output):
    source = open_source(write_output([row("a.b.wav"), row("a.wav")]))
    assert match(source, [names_of("a.b")]).clip_ids == ("a/a.b.wav",)


def test_rows_are_given_in_the_order_asked_for(write_output):
    rows = [row(f"{n}.wav", n, n, n, n, shard=f"s{n % 3}") for n in range(7)]
    rows.append(row("bad.wav", error="NoAudio"))
    source = open_source(write_output(rows))
    asked = ["5", "absent", "0", "bad", "6", "1"]
    matched = match(source, [names_of(name) for name in asked])
    assert matched.clips.tolist() == [0, 2, 4, 5]
    assert matched.scores[:, 0].tolist() == [5, 0, 6, 1]
    assert matched.failed == {3: "decode/NoAudio"}
    assert matched.unasked == 3  # 2, 3 and 4


def test_an_exact_name_outdoes_a_similar_one(write_output):
    # `b/x.wav` is asked for; another row has the same file name and comes first.
    rows = [row("x.wav", 1, 1, 1, 1), row("b/x.wav", 2, 2, 2, 2), row("c/x.wav", 3, 3, 3, 3)]
    source = open_source(write_output(rows))
    matched = match(source, [names_of("b/x.wav")])
    assert (matched.scores[0, 0], matched.unasked, matched.joined_by) == (2, 2, {"member": 1})


def test_equal_file_names_in_folders_are_told_apart(write_output):
    """As in data sets of a folder for each word: of `bird/000.wav` and `bed/000.wav` each is its own."""
    words = ("bed", "bird", "cat")
    rows = [
        row(f"{word}/{n:03}.wav", n, k, 0, 0) for k, word in enumerate(words) for n in range(50)
    ]
    source = open_source(write_output(rows))
    asked = ["bed/005.wav", "cat/005.wav", "cat/007.wav", "dog/005.wav"]
    matched = match(source, [names_of(name) for name in asked])
    assert matched.scores[:, :2].tolist() == [[5, 0], [5, 2], [7, 2]]
    assert (matched.joined_by, matched.unasked) == ({"member": 3}, 147)
    assert len(match(source, [names_of(f"dog/{n:03}.wav") for n in range(50)]).clips) == 0


def test_a_row_of_a_similar_name_makes_nothing_ambiguous(write_output):
    rows = [
        row("000.wav", 9, 9, 9, 9),
        row("bed/000.wav", 1, 1, 1, 1),
        row("cat/000.wav", 2, 2, 2, 2),
    ]
    asked = [names_of("bed/000.wav"), names_of("cat/000.wav")]
    for name, ordered in (("first", rows), ("last", [*rows[1:], rows[0]])):
        matched = match(open_source(write_output(ordered, name)), asked)
        assert matched.scores[:, 0].tolist() == [1, 2]
        assert matched.unasked == 1
    # One clip has a row of its own: what fits both is the other's.
    matched = match(open_source(write_output(rows[:2], "one")), asked)
    assert matched.scores[:, 0].tolist() == [1, 9]
    with pytest.raises(EvaluationError, match=r"more than one clip .*'000.wav', which fits 2"):
        match(open_source(write_output(rows[:1], "none")), asked)


def test_equal_names_of_other_bytes_are_other_clips(write_output):
    rows = [row("1.wav", hash="h"), row("2.wav"), row("3.wav", hash="k"), row("x/4.wav", hash="l")]
    source = open_source(write_output(rows))
    asked = [
        names_of("z/1.wav", "1.wav", "other"),
        names_of("z/2.wav", "2.wav", "not known there"),
        names_of("z/3.flac", "3.flac", "may be made from it"),
        names_of("z/4.wav", "4.wav", "other"),
        names_of("a/x/4.wav", "x/4.wav", "the same place"),
    ]
    matched = match(source, asked[:4])
    assert matched.clips.tolist() == [1, 2]
    assert matched.joined_by == {"member": 1, "file name without suffix": 1}
    assert (matched.unasked, matched.other_bytes) == (2, 2)
    assert match(source, asked[4:]).joined_by == {"clip_id": 1}


def test_names_are_joined_without_scores():
    clips = [names_of("z/a.wav", "a.wav", "h"), names_of("b"), names_of("c")]
    rows = [
        names_of("y/b.wav", "b.wav"),
        names_of("y/q.wav", "q.wav", "h"),
        names_of("y/r.wav", "r.wav", "h"),
    ]
    joined = join(clips, rows, "these", "those")
    assert joined.rows == {0: 1, 1: 0}
    assert joined.repeated == {2: 0}
    assert joined.kinds == {
        0: NAME_KINDS.index("audio_xxh128"),
        1: NAME_KINDS.index("file name without suffix"),
    }
    with pytest.raises(EvaluationError, match="1 clips of these fit more than one row of those"):
        join(clips[1:2], [names_of("x/b"), names_of("y/b")], "these", "those")


def test_a_failed_row_gives_way_to_a_more_exact_one(write_output):
    rows = [row("c/x.wav", error="NoAudio"), row("x.wav", 2, 2, 2, 2)]
    matched = match(open_source(write_output(rows)), [names_of("x.wav")])
    assert (matched.clips.tolist(), matched.failed) == ([0], {})


def test_a_name_that_fits_two_rows_is_refused_with_counts(write_output):
    rows = [row("x.wav", shard="s1"), row("x.wav", shard="s2"), row("y.wav")]
    source = open_source(write_output(rows))
    with pytest.raises(
        EvaluationError, match=r"1 clips of the truth fit more than one row .*'x.wav' \(member\)"
    ):
        match(source, [names_of("x.wav"), names_of("y.wav")])
    assert len(match(source, [names_of("s2/x.wav")]).clips) == 1


def test_equal_bytes_stand_for_each_other(write_output):
    rows = [row("p.wav", hash="h"), row("q.wav", hash="h"), row("r.wav", hash="i")]
    source = open_source(write_output(rows))
    matched = match(source, [names_of("elsewhere/1", "1.wav", "h")])
    assert (matched.joined_by, matched.repeated, matched.unasked) == ({"audio_xxh128": 1}, 1, 1)
    # Two clips of the same bytes take a row each, by their names where these tell.
    two = [names_of("z/q.wav", "q.wav", "h"), names_of("z/2.wav", "2.wav", "h")]
    assert match(source, two).clip_ids == ("a/q.wav", "a/p.wav")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"clip_id": [1]}, "column 'clip_id' of .* is int64; expected text"),
        ({"scores": ["0.5"]}, "column 'scores' of .* is string; expected lists of floating"),
        (
            {"scores": [["0.5"]]},
            "column 'scores' of .* is list<.*string>; expected lists of floating",
        ),
        ({"audio_xxh128": [7]}, "column 'audio_xxh128' of .* is int64"),
        ({"error": ["bad"]}, "column 'error' of .* is string; expected a struct"),
        ({"clip_id": pa.array([None], pa.string())}, "1 rows of .* have no clip_id"),
    ],
)
def test_columns_of_other_types_are_refused(tmp_path, columns, said):
    file = str(tmp_path / "x.parquet")
    scores = pa.array([[0.1, 0.2, 0.3, 0.4]], pa.list_(pa.float32(), 4))
    pq.write_table(pa.table({"clip_id": ["a"], "scores": scores} | columns), file)
    with pytest.raises(EvaluationError, match=said):
        match(open_source(file, labels=LABELS), [names_of("a")])


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"checkpoint": 1}', "null"])
def test_a_run_json_that_says_nothing_is_refused(write_output, tmp_path, content):
    folder = write_output([row("a.wav")])
    (tmp_path / "out" / "run.json").write_text(content)
    with pytest.raises(EvaluationError, match=r"out/run\.json does not say which checkpoint"):
        open_source(folder)


def test_metadata_that_is_no_object_is_refused(tmp_path):
    file = str(tmp_path / "x.parquet")
    scores = pa.array([[0.1, 0.2, 0.3, 0.4]], pa.list_(pa.float32(), 4))
    for text, said in (("[1]", "expected a JSON object"), ("{", "is no JSON")):
        pq.write_table(pa.table({"clip_id": ["a"], "scores": scores, "metadata": [text]}), file)
        with pytest.raises(EvaluationError, match=said):
            read_truth("metadata:a", open_source(file, labels=LABELS))


def test_sources_that_are_none(tmp_path, write_output):
    file = str(tmp_path / "x.parquet")
    pq.write_table(pa.table({"clip_id": ["a"], "score": [1.0]}), file)
    with pytest.raises(EvaluationError, match=r"no column 'scores' \(it has clip_id, score\)"):
        open_source(file)
    scores = pa.FixedSizeListArray.from_arrays(pa.array([1.0, 2.0]), 2)
    pq.write_table(pa.table({"clip_id": ["a"], "scores": scores}), file)
    with pytest.raises(EvaluationError, match="holds 2 scores a clip, but 527 labels"):
        open_source(file)
    short = pa.array([[1.0, 2.0], [1.0]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"clip_id": ["a", "b"], "scores": short}), file)
    two = open_source(file, labels=LABELS[:2])
    with pytest.raises(EvaluationError, match="rows without 2 scores"):
        match(two, [names_of("a"), names_of("b")])
