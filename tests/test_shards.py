from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from transforms import shards
from transforms.records import Shard
from transforms.shards import InputError, Plan, limit_shards, outdated, plan_shards, source_of

MakeTar = Callable[..., Path]

AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def touch(folder: Path, *names: str) -> None:
    """Writes files whose sizes are the lengths of their names."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * len(name))


def write_parquet(file: Path, rows: int, row_group_size: int | None = None) -> Path:
    cells = [{"bytes": os.urandom(1_000), "path": f"{row}.wav"} for row in range(rows)]
    table = pa.table({"audio": pa.array(cells, AUDIO)})
    pq.write_table(table, file, row_group_size=row_group_size)
    return file


def write_parquet_without_audio(file: Path) -> Path:
    pq.write_table(pa.table({"clip": ["a", "b"], "score": [0.1, 0.2]}), file)
    return file


def hashed(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())[:12]


def plan(*patterns: Path | str, **options: int) -> Plan:
    return plan_shards([str(pattern) for pattern in patterns], **options)


def files_of(planned: Iterable[Shard]) -> list[tuple[str, ...]]:
    return [shard.files for shard in planned]


# ------------------------------------------------------------------- planning


def test_a_tar_is_a_shard(tmp_path: Path, make_tar: MakeTar) -> None:
    tar = make_tar(tmp_path / "clips.tar", [("a.wav", b"1")])
    expected = Shard(f"clips-{hashed(str(tar))}", str(tar), "tar", tar.stat().st_size)
    assert plan(tar) == Plan([expected], Counter())


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "A.TAR"])
def test_tars_are_known_by_their_suffix(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name)
    (shard,) = plan(tmp_path).shards
    assert (shard.kind, shard.uri, shard.size_bytes) == ("tar", str(tmp_path / name), len(name))


def test_a_parquet_file_with_audio_is_a_shard(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "train-00000.parquet", 3)
    expected = Shard(f"train-00000-{hashed(str(file))}", str(file), "parquet", file.stat().st_size)
    assert plan(file) == Plan([expected], Counter())


def test_a_folder_is_walked_and_its_files_grouped(tmp_path: Path) -> None:
    touch(tmp_path / "set", "b.wav", "deep/er/c.mp3", "a.FLAC")
    files = ("a.FLAC", "b.wav", "deep/er/c.mp3")
    root = str(tmp_path / "set")
    expected = Shard(
        f"set-{hashed(root)}-00000-{hashed(chr(0).join(files))}",
        root,
        "files",
        sum(map(len, files)),
        files=files,
    )
    assert plan(tmp_path / "set") == Plan([expected], Counter())


def test_a_folder_of_everything_gives_archives_first_in_sorted_order(
    tmp_path: Path, make_tar: MakeTar
) -> None:
    make_tar(tmp_path / "z.tar", [("a.wav", b"1")])
    write_parquet(tmp_path / "m.parquet", 1)
    touch(tmp_path, "a/b.tar", "c.wav")
    planned = plan(tmp_path).shards
    assert [(shard.kind, os.path.relpath(shard.uri, tmp_path)) for shard in planned] == [
        ("tar", "a/b.tar"),
        ("parquet", "m.parquet"),
        ("tar", "z.tar"),
        ("files", "."),
    ]


def test_archives_keep_the_order_in_which_they_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.tar", "b.tar", "c.tar")
    planned = plan(tmp_path / "c.tar", tmp_path / "a.tar", tmp_path / "b.tar").shards
    assert [Path(shard.uri).name for shard in planned] == ["c.tar", "a.tar", "b.tar"]


def test_a_glob_gives_its_matches_in_sorted_order(tmp_path: Path) -> None:
    touch(tmp_path, "s-2.tar", "s-0.tar", "s-1.tar", "other.tar", "s-3.tar.bak")
    planned = plan(tmp_path / "s-*.tar").shards
    assert [Path(shard.uri).name for shard in planned] == ["s-0.tar", "s-1.tar", "s-2.tar"]


def test_a_glob_of_files_has_the_folder_before_its_first_mark_as_root(tmp_path: Path) -> None:
    touch(tmp_path, "in/b/2.wav", "in/a/1.wav", "in/a/deep/3.wav", "out/4.wav")
    (shard,) = plan(tmp_path / "in" / "*" / "*.wav").shards
    assert (shard.uri, shard.files) == (str(tmp_path / "in"), ("a/1.wav", "b/2.wav"))


def test_a_glob_of_two_stars_is_recursive(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.wav", "a/deep/3.wav", "2.wav")
    (shard,) = plan(tmp_path / "**" / "*.wav").shards
    assert shard.files == ("2.wav", "a/1.wav", "a/deep/3.wav")


def test_a_glob_of_folders_walks_them(tmp_path: Path) -> None:
    touch(tmp_path, "x-1/a.wav", "x-2/deep/b.wav", "y/c.wav")
    (shard,) = plan(tmp_path / "x-*").shards
    assert shard.files == ("x-1/a.wav", "x-2/deep/b.wav")


def test_a_file_whose_name_holds_glob_marks_is_itself(tmp_path: Path) -> None:
    touch(tmp_path, "take [1].wav", "take 1.wav")
    (shard,) = plan(tmp_path / "take [1].wav").shards
    assert shard.files == ("take [1].wav",)


def test_a_file_that_is_named_needs_no_known_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "clip.audio", "clip", "clip.wav")
    assert files_of(plan(tmp_path / "clip.audio").shards) == [("clip.audio",)]
    assert files_of(plan(tmp_path / "clip").shards) == [("clip",)]


def test_a_glob_that_names_a_suffix_needs_no_known_one(tmp_path: Path) -> None:
    touch(tmp_path, "a.audio", "b.audio", "c.wav")
    assert plan(tmp_path / "*.audio") == plan(tmp_path / "a.audio", tmp_path / "b.audio")
    assert files_of(plan(tmp_path / "*.audio").shards) == [("a.audio", "b.audio")]


def test_a_glob_that_names_no_suffix_takes_audio_only(tmp_path: Path) -> None:
    touch(tmp_path, "a.audio", "b.wav", "c.txt")
    planned = plan(tmp_path / "*")
    assert files_of(planned.shards) == [("b.wav",)]
    assert planned.ignored == Counter({".audio": 1, ".txt": 1})


def test_hidden_files_and_folders_are_skipped_without_a_count(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", ".b.wav", ".cache/c.wav", "deep/.d.wav", ".e.tar", ".DS_Store")
    planned = plan(tmp_path)
    assert files_of(planned.shards) == [("a.wav",)]
    assert planned.ignored == Counter()


def test_a_folder_inside_a_hidden_one_is_walked_when_named(tmp_path: Path) -> None:
    touch(tmp_path, ".cache/set/a.wav")
    assert files_of(plan(tmp_path / ".cache" / "set").shards) == [("a.wav",)]


def test_files_that_are_no_audio_are_counted_by_suffix(tmp_path: Path) -> None:
    touch(tmp_path / "one", "a.wav", "a.txt", "b.txt", "README", "c.JSON")
    touch(tmp_path / "two", "d.wav", "d.txt")
    expected = Counter({".txt": 3, "no suffix": 1, ".JSON": 1})
    assert plan(tmp_path / "one", tmp_path / "two").ignored == expected


def test_a_relative_path_a_slash_and_a_url_plan_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "set", "a.wav", "b.tar")
    monkeypatch.chdir(tmp_path)
    expected = plan(tmp_path / "set")
    assert expected.shards
    assert plan("set") == plan("set/") == plan("./set") == expected
    assert plan(f"file://{tmp_path}/set") == expected


def test_another_file_system_keeps_its_protocol() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/earmark-test-shards/a.tar", b"1234")
    memory.pipe("/earmark-test-shards/deep/b.wav", b"12")
    planned = plan("memory://earmark-test-shards").shards
    assert [(shard.kind, shard.uri, shard.size_bytes, shard.files) for shard in planned] == [
        ("tar", "memory:///earmark-test-shards/a.tar", 4, ()),
        ("files", "memory:///earmark-test-shards", 2, ("deep/b.wav",)),
    ]


def test_names_that_are_not_utf8_are_planned(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    touch(tmp_path / name, f"{name}.wav")
    touch(tmp_path, f"{name}.tar")
    tar, files = plan(tmp_path).shards
    assert tar.id.startswith("caf_-")
    assert files.files == (f"{name}/{name}.wav",)


# ------------------------------------------------------------------------ ids


def test_ids_are_the_same_in_every_run(tmp_path: Path) -> None:
    touch(tmp_path, "a.tar", "deep/b.wav", "c.wav")
    assert plan(tmp_path) == plan(tmp_path)


def test_equal_names_in_two_folders_have_two_ids(tmp_path: Path) -> None:
    touch(tmp_path, "one/a.tar", "two/a.tar", "one/set/x.wav", "two/set/x.wav")
    named = ("one/a.tar", "two/a.tar", "one/set", "two/set")
    ids = [shard.id for shard in plan(*(tmp_path / name for name in named)).shards]
    assert len(set(ids)) == 4
    assert [i.split("-")[0] for i in ids] == ["a", "a", "set", "set"]


def test_equal_stems_of_different_kinds_have_different_ids(tmp_path: Path) -> None:
    touch(tmp_path, "a.tar", "a.tgz", "a.tar.gz", "a/x.wav")
    write_parquet(tmp_path / "a.parquet", 1)
    planned = plan(*(tmp_path / name for name in ("a.tar", "a.tgz", "a.tar.gz", "a.parquet", "a")))
    assert len({shard.id for shard in planned.shards}) == 5


def test_an_id_does_not_depend_on_what_else_is_planned(tmp_path: Path) -> None:
    touch(tmp_path, "a.tar", "b.tar", "set/x.wav")
    (alone,) = plan(tmp_path / "a.tar").shards
    assert plan(tmp_path / "b.tar", tmp_path / "a.tar", tmp_path / "set").shards[1] == alone


def test_an_id_is_a_plain_file_name(tmp_path: Path) -> None:
    touch(tmp_path, "my clips; (été)/_.odd name?.tar", "x" * 200 + ".tar", "___.tar")
    ids = [shard.id.rpartition("-")[0] for shard in plan(tmp_path).shards]
    assert ids == ["shard", "odd_name_", "x" * 80]


def test_other_files_in_a_group_give_another_id(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", "b.wav")
    (before,) = plan(tmp_path).shards
    touch(tmp_path, "c.wav")
    (after,) = plan(tmp_path).shards
    assert before.id != after.id
    assert before.id.rpartition("-")[0] == after.id.rpartition("-")[0]


# --------------------------------------------------------------------- groups


def test_files_are_grouped_by_files_per_shard(tmp_path: Path) -> None:
    touch(tmp_path / "set", *(f"{number}.wav" for number in range(5)))
    planned = plan(tmp_path / "set", files_per_shard=2).shards
    assert files_of(planned) == [("0.wav", "1.wav"), ("2.wav", "3.wav"), ("4.wav",)]
    assert [shard.size_bytes for shard in planned] == [10, 10, 5]
    assert [shard.id.split("-")[2] for shard in planned] == ["00000", "00001", "00002"]


def test_files_are_sorted_whatever_the_order_in_which_they_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", "b.wav", "c.wav")
    named = plan(tmp_path / "c.wav", tmp_path / "a.wav", tmp_path / "b.wav")
    assert files_of(named.shards) == [("a.wav", "b.wav", "c.wav")]
    assert named == plan(tmp_path)


def test_as_many_files_as_a_group_holds_are_one_group(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number}.wav" for number in range(4)))
    assert files_of(plan(tmp_path, files_per_shard=4).shards) == [
        ("0.wav", "1.wav", "2.wav", "3.wav")
    ]


def test_each_named_folder_is_grouped_by_itself(tmp_path: Path) -> None:
    touch(tmp_path, "b/1.wav", "a/2.wav")
    planned = plan(tmp_path / "b", tmp_path / "a").shards
    assert [(Path(shard.uri).name, shard.files) for shard in planned] == [
        ("a", ("2.wav",)),
        ("b", ("1.wav",)),
    ]


def test_what_is_named_twice_is_planned_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.tar", "x.wav", "y.wav")
    expected = plan(tmp_path)
    again = plan(tmp_path, tmp_path / "a.tar", tmp_path / "x.wav", tmp_path / "*.wav", tmp_path)
    assert again.shards == expected.shards


def test_a_file_under_two_named_folders_is_planned_once(tmp_path: Path) -> None:
    touch(tmp_path, "set/deep/x.wav", "set/y.wav")
    planned = plan(tmp_path / "set", tmp_path / "set" / "deep").shards
    files = [os.path.join(shard.uri, file) for shard in planned for file in shard.files]
    assert sorted(files) == [str(tmp_path / "set/deep/x.wav"), str(tmp_path / "set/y.wav")]


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["nothing.tar", "nothing", "no/such/folder/"])
def test_a_path_that_does_not_exist_is_refused(tmp_path: Path, name: str) -> None:
    pattern = f"{tmp_path}/{name}"
    with pytest.raises(InputError) as refusal:
        plan(pattern)
    assert str(refusal.value) == f"{pattern!r} does not exist"


def test_a_glob_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav")
    pattern = str(tmp_path / "*.tar")
    with pytest.raises(InputError) as refusal:
        plan(tmp_path, pattern)
    assert str(refusal.value) == (
        f"{pattern!r} matches no tar, no Parquet with an audio column and no audio file; check the "
        "path, and quote globs so that the shell leaves them alone"
    )


def test_a_folder_without_audio_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    touch(tmp_path, "a.txt", "b.txt", "c.png")
    write_parquet_without_audio(tmp_path / "d.parquet")
    with pytest.raises(InputError) as refusal:
        plan(tmp_path)
    assert str(refusal.value).startswith(
        f"{str(tmp_path)!r} matches no tar, no Parquet with an audio column and no audio file "
        "(only 2 .txt, 1 .png, 1 .parquet without audio); "
    )


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(InputError) as refusal:
        plan("")
    assert str(refusal.value) == "an input is an empty string; is a shell variable unset?"


def test_a_local_name_may_look_like_a_chain_of_file_systems(tmp_path: Path) -> None:
    touch(tmp_path, "zip::a/x.wav")
    (shard,) = plan(tmp_path / "zip::a").shards
    assert (shard.uri, shard.files) == (str(tmp_path / "zip::a"), ("x.wav",))


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(InputError, match=r"^'nosuch://set/\*\.tar' cannot be opened: .*nosuch"):
        plan("nosuch://set/*.tar")


def test_a_parquet_file_without_audio_is_refused_when_named(tmp_path: Path) -> None:
    file = write_parquet_without_audio(tmp_path / "scores.parquet")
    with pytest.raises(InputError) as refusal:
        plan(file)
    assert str(refusal.value) == (
        f"{str(file)!r} has no audio column: expected a struct<bytes, path> as Hugging Face stores "
        "audio, found clip: string, score: double"
    )


def test_a_parquet_file_without_audio_is_ignored_in_a_folder(tmp_path: Path) -> None:
    write_parquet_without_audio(tmp_path / "scores.parquet")
    write_parquet(tmp_path / "clips.parquet", 1)
    planned = plan(tmp_path)
    assert [Path(shard.uri).name for shard in planned.shards] == ["clips.parquet"]
    assert planned.ignored == Counter({".parquet without audio": 1})


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no Parquet at all"])
def test_a_broken_parquet_file_is_a_shard_that_says_so_when_read(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "broken.parquet").write_bytes(content)
    (shard,) = plan(tmp_path).shards
    assert (shard.kind, shard.size_bytes, shard.row_groups) == ("parquet", len(content), None)


# ------------------------------------------------------------ large Parquet files


def test_a_large_parquet_file_is_split_by_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_parquet(tmp_path / "big.parquet", 10, row_group_size=2)
    (whole,) = plan(file).shards
    footer = pq.read_metadata(file)
    sizes = [
        sum(footer.row_group(g).column(c).total_compressed_size for c in range(2)) for g in range(5)
    ]
    monkeypatch.setattr(shards, "PARQUET_SHARD_BYTES", sizes[0] + 1)
    expected = [
        Shard(
            f"{whole.id}-rg{first:05d}-{end:05d}",
            str(file),
            "parquet",
            size,
            (),
            (first, end),
            file_sizes=(file.stat().st_size,),
        )
        for first, end, size in [
            (0, 2, sizes[0] + sizes[1]),
            (2, 4, sizes[2] + sizes[3]),
            (4, 5, sizes[4]),
        ]
    ]
    assert plan(file).shards == expected


def test_a_large_parquet_file_of_one_row_group_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_parquet(tmp_path / "big.parquet", 10)
    whole = plan(file)
    monkeypatch.setattr(shards, "PARQUET_SHARD_BYTES", 1)
    assert plan(file) == whole


def test_a_split_never_changes_with_the_limit_of_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_parquet(tmp_path / "big.parquet", 6, row_group_size=2)
    monkeypatch.setattr(shards, "PARQUET_SHARD_BYTES", 1)
    alone = plan(file).shards
    write_parquet(tmp_path / "a.parquet", 4, row_group_size=2)
    assert [shard.row_groups for shard in alone] == [(0, 1), (1, 2), (2, 3)]
    assert plan(tmp_path).shards[2:] == alone


# --------------------------------------------------------------------- --limit


def limited(planned: Iterable[Shard], max_clips: int) -> list[tuple[str, int | None]]:
    return [(Path(shard.uri).name, shard.max_clips) for shard in limit_shards(planned, max_clips)]


def test_a_limit_takes_the_first_clips_of_all_kinds(tmp_path: Path, make_tar: MakeTar) -> None:
    names = ["a.wav", "a.json", "b.wav", "c.wav"]
    make_tar(tmp_path / "a.tar", [(name, b"1") for name in names])
    write_parquet(tmp_path / "b.parquet", 4)
    touch(tmp_path, "x.wav", "y.wav")
    planned = plan(tmp_path).shards
    root = tmp_path.name
    assert limited(planned, 1) == [("a.tar", 1)]
    assert limited(planned, 3) == [("a.tar", 3)]
    assert limited(planned, 4) == [("a.tar", 3), ("b.parquet", 1)]
    assert limited(planned, 8) == [("a.tar", 3), ("b.parquet", 4), (root, 1)]
    assert limited(planned, 99) == [("a.tar", 3), ("b.parquet", 4), (root, 2)]


def test_a_limit_changes_nothing_but_max_clips(tmp_path: Path, make_tar: MakeTar) -> None:
    make_tar(tmp_path / "a.tar", [("a.wav", b"1"), ("b.wav", b"2")])
    (shard,) = plan(tmp_path).shards
    assert limit_shards([shard], 1) == [dataclasses.replace(shard, max_clips=1)]


def test_a_limit_counts_the_rows_of_the_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_parquet(tmp_path / "big.parquet", 5, row_group_size=2)
    monkeypatch.setattr(shards, "PARQUET_SHARD_BYTES", 1)
    assert limited(plan(file).shards, 4) == [("big.parquet", 2), ("big.parquet", 2)]
    assert limited(plan(file).shards, 9)[2:] == [("big.parquet", 1)]


def test_a_limit_counts_a_broken_shard_as_the_row_that_says_so(
    tmp_path: Path, make_tar: MakeTar
) -> None:
    tar = make_tar(tmp_path / "a.tar", [("a.wav", b"1"), ("b.wav", b"2")])
    tar.write_bytes(tar.read_bytes()[:1_100])  # inside the header of b.wav
    (tmp_path / "b.parquet").write_bytes(b"broken")
    touch(tmp_path, "x.wav")
    planned = plan(tmp_path).shards
    assert limited(planned, 9) == [("a.tar", 2), ("b.parquet", 1), (tmp_path.name, 1)]


# -------------------------------------------------------------------- outdated


def outdated_by(planned: Iterable[Shard], finished: Iterable[str]) -> list[str]:
    ids = {shard.id for shard in planned}
    sources = {source_of(shard.id) for shard in planned if shard.kind != "tar"}
    return outdated(sources, [shard_id for shard_id in finished if shard_id not in ids])


def test_nothing_is_outdated_when_the_input_is_the_same(tmp_path: Path) -> None:
    touch(tmp_path, "a.tar", "x.wav")
    planned = plan(tmp_path).shards
    assert outdated_by(planned, [shard.id for shard in planned]) == []


def test_a_folder_with_other_files_outdates_its_finished_shards(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number}.wav" for number in range(4)))
    before = plan(tmp_path, files_per_shard=2).shards
    touch(tmp_path, "1b.wav")
    after = plan(tmp_path, files_per_shard=2).shards
    assert after[0] == before[0]
    assert outdated_by(after, [shard.id for shard in before]) == [before[1].id]


def test_another_division_of_a_parquet_file_outdates_its_finished_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_parquet(tmp_path / "big.parquet", 6, row_group_size=2)
    (whole,) = plan(file).shards
    monkeypatch.setattr(shards, "PARQUET_SHARD_BYTES", 1)
    split = plan(file).shards
    assert outdated_by(split, [whole.id]) == [whole.id]
    assert outdated_by([whole], [shard.id for shard in split]) == [shard.id for shard in split]


def test_finished_shards_of_other_inputs_are_not_outdated(tmp_path: Path) -> None:
    touch(tmp_path, "a.tar", "b.tar", "one/set/x.wav", "two/set/x.wav")
    finished = [shard.id for shard in plan(tmp_path / "a.tar", tmp_path / "one" / "set").shards]
    planned = plan(tmp_path / "b.tar", tmp_path / "two" / "set").shards
    assert outdated_by(planned, finished) == []


def test_names_that_look_like_ids_outdate_nothing(tmp_path: Path) -> None:
    touch(tmp_path, "clips-0123456789ab-a.tar", "clips-0123456789ab-b.tar")
    a, b = plan(tmp_path).shards
    assert outdated_by([b], [a.id]) == []
