from __future__ import annotations

import base64
import dataclasses
import os
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from bench.stand_ins import CloudStorage
from transforms import containers, shards, storage
from transforms.listing import InputError
from transforms.read import read_clips
from transforms.records import EncodedClip, Shard
from transforms.shard_id import has_row_groups, source_of
from transforms.shards import (
    Plan,
    find_shards,
    limit_shards,
    outdated,
    pack_shards,
    plan_shards,
    unpack_shards,
)

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


def written(file: Path) -> str:
    return f"mtime:{round(file.stat().st_mtime * 1e6)}"


def hashed(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())[:12]


def plan(*patterns: Path | str, **options: int) -> Plan:
    return plan_shards([str(pattern) for pattern in patterns], **options)


def files_of(planned: Iterable[Shard]) -> list[tuple[str, ...]]:
    return [shard.files for shard in planned]


# ------------------------------------------------------------------- planning


def test_a_tar_is_a_shard(tmp_path: Path, make_tar: MakeTar) -> None:
    tar = make_tar(tmp_path / "clips.tar", [("a.wav", b"1")])
    expected = Shard(
        f"clips-{hashed(str(tar))}", str(tar), "tar", tar.stat().st_size, checksum=written(tar)
    )
    assert plan(tar) == Plan([expected], Counter())


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "A.TAR"])
def test_tars_are_known_by_their_suffix(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name)
    (shard,) = plan(tmp_path).shards
    assert (shard.kind, shard.uri, shard.size_bytes) == ("tar", str(tmp_path / name), len(name))


def test_a_parquet_file_with_audio_is_a_shard(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "train-00000.parquet", 3)
    expected = Shard(
        f"train-00000-{hashed(str(file))}",
        str(file),
        "parquet",
        file.stat().st_size,
        checksum=written(file),
    )
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
        file_sizes=tuple(map(len, files)),
        file_checksums=tuple(written(tmp_path / "set" / file) for file in files),
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
    for name in ("clip.audio", "clip"):
        (tmp_path / name).write_bytes(b"RIFF\4\0\0\0WAVE")
    assert files_of(plan(tmp_path / "clip.audio").shards) == [("clip.audio",)]
    assert files_of(plan(tmp_path / "clip").shards) == [("clip",)]


def test_a_glob_that_names_a_suffix_needs_no_known_one(tmp_path: Path) -> None:
    touch(tmp_path, "c.wav")
    for name in ("a.audio", "b.audio"):
        (tmp_path / name).write_bytes(b"RIFF\4\0\0\0WAVE")
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
        f"{str(file)!r} has no audio column (a struct<bytes, path> as Hugging Face stores audio), and "
        "as a manifest it has no path column; it has clip: string, score: double: name the column of "
        "the audio's paths with --path-column (path, audio_filepath, file_name, filename and the like "
        "are found)"
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
    for module in (containers, shards):
        monkeypatch.setattr(module, "PARQUET_SHARD_BYTES", sizes[0] + 1)
    expected = [
        Shard(
            f"{whole.id}-rg{first:05d}-{end:05d}",
            str(file),
            "parquet",
            size,
            (),
            (first, end),
            file_sizes=(file.stat().st_size,),
            checksum=written(file),
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
    for module in (containers, shards):
        monkeypatch.setattr(module, "PARQUET_SHARD_BYTES", 1)
    assert plan(file) == whole


def test_a_split_never_changes_with_the_limit_of_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_parquet(tmp_path / "big.parquet", 6, row_group_size=2)
    for module in (containers, shards):
        monkeypatch.setattr(module, "PARQUET_SHARD_BYTES", 1)
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
    for module in (containers, shards):
        monkeypatch.setattr(module, "PARQUET_SHARD_BYTES", 1)
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


def test_row_groups_are_told_by_the_end_of_an_id() -> None:
    assert has_row_groups("t-0123456789ab-rg00000-00004")
    for other in ("my-rg-set-0123456789ab-00000-0123456789ab", "a-rg00000-00004-0123456789ab"):
        assert not has_row_groups(other)
    assert source_of("t-0123456789ab-rg00000-00004") == "t-0123456789ab"
    assert source_of("my-rg-set-0123456789ab-00000-0123456789ab") == "my-rg-set-0123456789ab"


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
    for module in (containers, shards):
        monkeypatch.setattr(module, "PARQUET_SHARD_BYTES", 1)
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


# --------------------------------------------------------------- Cloud Storage


@pytest.fixture(scope="module")
def running() -> Iterator[CloudStorage]:
    with CloudStorage("in", "many") as cloud:
        cloud.put_many("many", [f"tars/{n:05}.tar" for n in range(2_100)], b"tar")
        cloud.put_many("many", [f"long/{n:05}.tar" for n in range(6_000)], b"tar")
        cloud.put_many("many", [f"files/{n // 100}/{n:05}.wav" for n in range(2_100)], b"wav")
        yield cloud


@pytest.fixture
def cloud(
    running: CloudStorage, monkeypatch: pytest.MonkeyPatch, lead_to: Callable[..., None]
) -> CloudStorage:
    """Cloud Storage without faults, its log empty, and the clients of this process led to it."""
    for name in running.names("in"):
        running.delete("in", name)
    running.faults = None
    running.requests.clear()
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)
    lead_to(running.env)
    return running


TREE = [
    *("a.wav", "z.wav", "m/1.wav", "m/2.flac", "m-1.wav", "m0.wav", "m/deep/3.wav", "n.txt"),
    *("é/4.wav", "a b/#5.wav", "a b/100%.wav", "日本/7.mp3", "s.tar", "m/t.tar"),
]


@pytest.fixture
def twice(cloud: CloudStorage, tmp_path: Path) -> Path:
    """The files of `TREE` in `gs://in/set` and in the folder that this gives."""
    touch(tmp_path / "set", *TREE)
    for name in TREE:
        cloud.put("in", f"set/{name}", b"x" * len(name))
    for marker in ("set/", "set/m/", "set/empty/"):
        cloud.put("in", marker, b"")
    return tmp_path / "set"


def below(root: str, planned: Plan) -> list[tuple[str, str, int, tuple[str, ...]]]:
    """Shards with what does not depend on where the root is."""
    return [
        (shard.kind, os.path.relpath(shard.uri, root), shard.size_bytes, shard.files)
        for shard in planned.shards
    ]


@pytest.mark.parametrize("files_per_shard", [1, 2, 3, 256])
@pytest.mark.parametrize("pattern", ["", "/*", "/*.wav", "/**/*.wav", "/m*", "/*/*", "/m/*"])
def test_shards_of_cloud_storage_are_those_of_a_local_copy(
    twice: Path, pattern: str, files_per_shard: int
) -> None:
    local = plan(f"{twice}{pattern}", files_per_shard=files_per_shard)
    remote = plan(f"gs://in/set{pattern}", files_per_shard=files_per_shard)
    kind = lambda shard: shard[0] == "files"  # noqa: E731
    assert sorted(below("gs://in/set", remote), key=kind) == sorted(
        below(str(twice), local), key=kind
    )
    assert remote.ignored == local.ignored
    assert plan(f"gs://in/set{pattern}", files_per_shard=files_per_shard) == remote
    for shard in remote.shards:
        assert shard.file_sizes == tuple(map(len, (f"{file}" for file in named(shard, pattern))))


def named(shard: Shard, pattern: str) -> list[str]:
    """The files of a shard, relative to the set: their lengths are their sizes."""
    folder = "m/" if pattern == "/m/*" else ""
    return [folder + file for file in shard.files]


def test_a_glob_that_matches_a_file_and_its_folder_gives_it_once(twice: Path) -> None:
    local, remote = plan(f"{twice}/**"), plan("gs://in/set/**")
    assert below(str(twice), local) == below("gs://in/set", remote)
    assert len({shard.id for shard in local.shards}) == len(local.shards)


@pytest.mark.parametrize("pattern", ["/*", "/*.wav", "/*/*.wav", "/**/*.wav"])
def test_globs_leave_out_what_is_hidden_as_folders_do(twice: Path, pattern: str) -> None:
    expected = plan(f"{twice}{pattern}")
    touch(twice, ".b.wav", ".hidden/c.wav", "m/.d.wav")
    assert plan(f"{twice}{pattern}") == expected


def test_objects_with_two_slashes_keep_both(cloud: CloudStorage) -> None:
    cloud.put("in", "slashes/a//b.wav", b"1")
    (shard,) = plan("gs://in/slashes").shards
    (clip,) = read_clips(shard)
    assert isinstance(clip, EncodedClip)


def test_a_glob_leaves_out_what_is_hidden_in_cloud_storage(cloud: CloudStorage) -> None:
    for name in ("a.wav", ".b.wav", ".hidden/c.wav", "m/.d.wav", "m/e.wav"):
        cloud.put("in", f"dots/{name}", b"1")
    for pattern in ("", "/*", "/**/*.wav"):
        assert files_of(plan(f"gs://in/dots{pattern}").shards) == [("a.wav", "m/e.wav")]


def test_a_shard_of_cloud_storage_knows_its_checksum(cloud: CloudStorage) -> None:
    cloud.put("in", "a b/c#1.tar", b"123456789")
    (shard,) = plan("gs://in/a b/c#1.tar").shards
    uri = "gs://in/a b/c#1.tar"
    # The CRC-32C of "123456789" is e3 06 92 83.
    assert shard == Shard(f"c_1-{hashed(uri)}", uri, "tar", 9, checksum="4waSgw==")
    assert plan("gs://in/a b").shards == plan("gs://in/a b/*.tar").shards == [shard]
    assert plan("gs://in").shards == [shard]


def test_a_name_with_a_globs_marks_is_itself_in_cloud_storage_too(cloud: CloudStorage) -> None:
    for name in ("take [1].wav", "take 1.wav", "what?/a.wav", "whats/b.wav"):
        cloud.put("in", f"marks/{name}", b"1")
    assert files_of(plan("gs://in/marks/take [1].wav").shards) == [("take [1].wav",)]
    assert files_of(plan("gs://in/marks/what?").shards) == [("a.wav",)]
    assert files_of(plan("gs://in/marks/take [12].wav").shards) == [("take 1.wav",)]


def pages_of(cloud: CloudStorage, prefix: str) -> int:
    return sum(r.kind == "list" and r.query["prefix"] == prefix for r in cloud.requests)


@pytest.mark.parametrize("pattern", ["gs://many/tars", "gs://many/tars/*.tar", "gs://many/tars/**"])
def test_the_first_tar_comes_before_the_second_page_was_asked_for(
    cloud: CloudStorage, pattern: str
) -> None:
    found = find_shards([pattern], Counter())
    assert next(found).uri == "gs://many/tars/00000.tar"
    assert pages_of(cloud, "tars/") == 1
    assert sum(1 for _ in found) == 2_099
    assert pages_of(cloud, "tars/") == 3


def test_groups_of_files_come_as_they_are_found(cloud: CloudStorage) -> None:
    found = find_shards(["gs://many/files"], Counter(), files_per_shard=256)
    first = next(found)
    assert first.files == tuple(sorted(f"{n // 100}/{n:05}.wav" for n in range(2_100)))[:256]
    assert sum(1 for r in cloud.requests if r.kind == "list") == 1
    groups = [first, *found]
    assert [len(shard.files) for shard in groups] == [256] * 8 + [52]
    assert [shard.id.split("-")[2] for shard in groups] == [f"{n:05}" for n in range(9)]
    # Named beside something else, they are divided in the same way.
    cloud.put("in", "other.tar", b"1")
    both = plan("gs://many/files", "gs://in/other.tar").shards
    assert [shard for shard in both if shard.kind == "files"] == groups


def test_no_more_than_a_page_is_held_in_memory(cloud: CloudStorage) -> None:
    def peak(pattern: str, shards: int) -> int:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        assert sum(1 for _ in find_shards([pattern], Counter())) == shards
        return tracemalloc.get_traced_memory()[1] - before

    tracemalloc.start()
    try:
        peak("gs://many/long/00*.tar", 1_000)  # what is made once
        assert peak("gs://many/long/*.tar", 6_000) < 1.5 * peak("gs://many/long/00*.tar", 1_000)
    finally:
        tracemalloc.stop()


def test_overlapping_patterns_give_nothing_twice(twice: Path) -> None:
    patterns = [
        "gs://in/set",
        "gs://in/set/*.tar",
        "gs://in/set/m",
        "gs://in/set/**",
        "gs://in/set",
    ]
    planned = plan(*patterns, files_per_shard=2).shards
    tars = [shard.uri for shard in planned if shard.kind == "tar"]
    assert sorted(tars) == ["gs://in/set/m/t.tar", "gs://in/set/s.tar"]
    files = [f"{shard.uri}/{file}" for shard in planned for file in shard.files]
    audio = [name for name in TREE if not name.endswith((".tar", ".txt"))]
    assert sorted(files) == sorted(f"gs://in/set/{name}" for name in audio)
    assert len({shard.id for shard in planned}) == len(planned)
    assert plan(*patterns, files_per_shard=2).shards == planned


def test_parquet_in_cloud_storage(
    cloud: CloudStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = write_parquet(tmp_path / "a.parquet", 600, row_group_size=200).read_bytes()
    cloud.put("in", "p/a.parquet", content)
    write_parquet_without_audio(tmp_path / "b.parquet")
    cloud.put("in", "p/b.parquet", (tmp_path / "b.parquet").read_bytes())
    planned = plan("gs://in/p")
    (whole,) = planned.shards
    assert (whole.uri, whole.kind, whole.size_bytes) == (
        "gs://in/p/a.parquet",
        "parquet",
        len(content),
    )
    assert planned.ignored == Counter({".parquet without audio": 1})
    for module in (containers, shards):
        monkeypatch.setattr(module, "PARQUET_SHARD_BYTES", 1)
    split = plan("gs://in/p/a.parquet").shards
    assert [(shard.row_groups, shard.file_sizes) for shard in split] == [
        ((n, n + 1), (len(content),)) for n in range(3)
    ]
    assert limited(split, 450) == [("a.parquet", 200), ("a.parquet", 200), ("a.parquet", 50)]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("gs://in/nothing", "'gs://in/nothing' does not exist"),
        ("gs://in/nothing/*.tar", "'gs://in/nothing/*.tar' matches no tar"),
        ("gs://", "'gs://' cannot be listed: gs:// names no bucket: expected gs://BUCKET/NAME"),
        ("gs://in*/a.tar", "'gs://in*/a.tar' cannot be listed: gs://in*/a.tar names no bucket"),
        (
            "gs://nobucket/a",
            "'gs://nobucket/a' cannot be listed: there is no bucket gs://nobucket: check the spelling",
        ),
    ],
)
def test_what_is_not_in_cloud_storage_is_refused(
    cloud: CloudStorage, pattern: str, message: str
) -> None:
    with pytest.raises(InputError) as refusal:
        plan(pattern)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize("pattern", ["gs://in/a**.tar", "{tmp}/a**.tar"])
def test_a_glob_that_cannot_be_is_refused(
    cloud: CloudStorage, tmp_path: Path, pattern: str
) -> None:
    with pytest.raises(InputError, match=r"a\*\*\.tar' cannot be understood: Invalid pattern"):
        plan(pattern.format(tmp=tmp_path))


# ------------------------------------------------------------------- packets


def test_shards_of_all_kinds_come_out_of_their_packets_as_they_went_in(
    tmp_path: Path, make_tar: MakeTar, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = os.fsdecode(b"caf\xe9")
    touch(tmp_path, f"{odd}/{odd}.wav", f"{odd}.tar", "日本.wav")
    write_parquet(tmp_path / "big.parquet", 6, row_group_size=2)
    for module in (containers, shards):
        monkeypatch.setattr(module, "PARQUET_SHARD_BYTES", 1)
    planned = plan(tmp_path).shards
    planned.append(dataclasses.replace(planned[0], max_clips=7))
    planned.append(
        Shard("f-1", "gs://b/f", "files", 3, ("a", "b"), file_sizes=(1, 2), checksum="4waSgw==")
    )
    assert {shard.kind for shard in planned} == {"tar", "parquet", "files"}
    (packet,) = pack_shards(planned)
    unpacked = list(unpack_shards(packet))
    assert unpacked == planned
    assert [hash(shard) for shard in unpacked] == [hash(shard) for shard in planned]
    assert Path(unpacked[-3].uri, unpacked[-3].files[0]).exists()


@pytest.mark.parametrize("count", [0, 1, 1_000, 1_001, 2_500])
def test_a_packet_holds_a_thousand_shards(count: int) -> None:
    planned = [Shard(f"s-{n}", f"gs://b/{n}.tar", "tar", n) for n in range(count)]
    packets = list(pack_shards(iter(planned)))
    assert [len(list(unpack_shards(packet))) for packet in packets] == [
        min(1_000, count - start) for start in range(0, count, 1_000)
    ]
    assert [shard for packet in packets for shard in unpack_shards(packet)] == planned


def test_packets_are_made_as_they_are_asked_for() -> None:
    made = []

    def endless() -> Iterator[Shard]:
        while True:
            made.append(1)
            yield Shard("s", "gs://b/s.tar", "tar", 1)

    packets = pack_shards(endless())
    assert len(list(unpack_shards(next(packets)))) == 1_000
    assert len(made) == 1_000


def test_a_hundred_thousand_shards_are_packed_into_less_than_4_mb() -> None:
    def planned() -> Iterator[Shard]:
        for n in range(100_000):
            uri = f"gs://my-company-audio-archive/field-recordings/2026/shard-{n:06}-of-100000.tar"
            checksum = base64.b64encode(hashed(uri).encode()[:4]).decode()
            size = 400_000_000 + int(hashed(uri)[:6], 16)
            yield Shard(
                f"shard-{n:06}-of-100000-{hashed(uri)}", uri, "tar", size, checksum=checksum
            )

    assert sum(map(len, pack_shards(planned()))) < 4_000_000
