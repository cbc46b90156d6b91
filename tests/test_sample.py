"""Clips drawn from shards stand for all of them."""

from __future__ import annotations

import errno
import random
import statistics
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transforms.records import EncodedClip, Shard
from transforms.sample import Reservoir, draw_shards, extent_of, read_part
from transforms.shards import plan_shards


def later() -> float:
    return time.monotonic() + 60


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, make_tar) -> Path:
    """A tar of 600 clips: small ones in its first third, large ones behind."""
    file = tmp_path_factory.mktemp("uneven") / "a.tar"
    members = []
    for number in range(600):
        content = random.Random(number).randbytes(1_000 if number < 200 else 9_000)
        members += [(f"{number:04d}.wav", content), (f"{number:04d}.json", b'{"a": 1}')]
    return make_tar(file, members)


def shard_of(path: Path, **options: int) -> Shard:
    (shard,) = plan_shards([str(path)], **options).shards
    return shard


def test_larger_shards_are_drawn_more_often_and_none_twice():
    shards = [
        Shard(f"s{n}", f"s{n}", "tar", size) for n, size in enumerate([100] * 50 + [900] * 50)
    ]
    drawn = [draw_shards(shards, 10, seed) for seed in range(200)]
    assert all(len({shard.id for shard in of}) == 10 for of in drawn)
    first = Counter(of[0].size_bytes for of in drawn)
    assert 0.82 < first[900] / 200 < 0.97  # nine times as large: 0.9
    assert draw_shards(shards, 10, 7) == draw_shards(iter(shards), 10, 7)
    assert len(draw_shards(shards, 1_000, 0)) == 100


def test_an_empty_shard_can_be_drawn_only_when_all_are():
    shards = [Shard("empty", "empty", "tar", 0), Shard("full", "full", "tar", 5)]
    assert all(draw_shards(shards, 1, seed)[0].id == "full" for seed in range(20))


def test_each_clip_is_kept_as_likely_as_any_other():
    counts: Counter[str] = Counter()
    for seed in range(400):
        reservoir = Reservoir(5, random.Random(seed))
        for number in range(20):
            audio = pa.BufferReader(b"x")
            reservoir.offer(EncodedClip(str(number), audio, 1, "", {}), 0)
        counts.update(taken.clip.member for taken in reservoir.kept)
    assert set(counts) == {str(n) for n in range(20)}
    assert all(65 < count < 140 for count in counts.values())  # 100 expected, nine deviations wide


def test_a_whole_tar_is_counted_and_its_clips_are_copies(uneven):
    reservoir = Reservoir(600, random.Random(0))
    part = read_part(shard_of(uneven), 3, reservoir, max_bytes=None, until=later())
    assert (part.clips, part.whole, part.extent) == (600, True, uneven.stat().st_size)
    assert part.audio_bytes == 200 * 1_000 + 400 * 9_000
    clips = {taken.clip.member: taken for taken in reservoir.kept}
    assert clips["0000.wav"].clip.audio.read() == random.Random(0).randbytes(1_000)
    assert clips["0000.wav"].clip.metadata == {"a": 1} and clips["0000.wav"].part == 3


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_parts_from_anywhere_in_a_tar_say_how_many_clips_there_are(
    uneven, suffix, tmp_path, make_tar
):
    """The beginning alone, where clips are small, would say four times too many."""
    shard = shard_of(uneven)
    parts = [
        read_part(shard, n, Reservoir(5, random.Random(n)), max_bytes=100_000, until=later())
        for n in range(200)
    ]
    assert not any(part.whole for part in parts)
    extent = sum(part.extent for part in parts)
    found = shard.size_bytes * sum(part.clips for part in parts) / extent
    assert found == pytest.approx(600, rel=0.12)
    members = {taken.clip.member for n in range(200) for taken in _kept(shard, n)}
    assert {int(name[:4]) // 100 for name in members} == {0, 1, 2, 3, 4, 5}


def _kept(shard: Shard, seed: int):
    reservoir = Reservoir(5, random.Random(seed))
    read_part(shard, 0, reservoir, max_bytes=100_000, until=later())
    return reservoir.kept


def test_a_compressed_tar_is_read_from_its_beginning(tmp_path, make_tar):
    members = [(f"{n}.wav", random.Random(n).randbytes(5_000)) for n in range(200)]
    shard = shard_of(make_tar(tmp_path / "a.tar.gz", members, mode="w:gz"))
    reservoir = Reservoir(5, random.Random(0))
    part = read_part(shard, 0, reservoir, max_bytes=400_000, until=later())
    assert not part.whole
    assert shard.size_bytes * part.clips / part.extent == pytest.approx(200, rel=0.1)


def test_row_groups_of_parquet_say_how_many_rows_there_are(tmp_path):
    cells = [{"bytes": random.Random(n).randbytes(2_000), "path": f"{n}.wav"} for n in range(300)]
    audio = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"audio": audio}), tmp_path / "a.parquet", row_group_size=50)
    shard = shard_of(tmp_path / "a.parquet")
    parts = [
        read_part(shard, n, Reservoir(5, random.Random(n)), max_bytes=20_000, until=later())
        for n in range(12)
    ]
    for part in parts:
        assert not part.whole and part.clips < 50
        assert shard.size_bytes * part.clips / part.extent == pytest.approx(300)
    groups = {int(t.clip.member[:-4]) // 50 for n in range(12) for t in _kept_small(shard, n)}
    assert len(groups) >= 4


def _kept_small(shard: Shard, seed: int):
    reservoir = Reservoir(5, random.Random(seed))
    read_part(shard, 0, reservoir, max_bytes=20_000, until=later())
    return reservoir.kept


def test_loose_files_are_counted_already_and_drawn_from_all_over(tmp_path):
    for number in range(200):
        (tmp_path / f"{number:03d}.wav").write_bytes(b"x" * 100)
    shard = shard_of(tmp_path)
    assert extent_of(shard) == 200
    seen = set()
    for seed in range(10):
        reservoir = Reservoir(200, random.Random(seed))
        part = read_part(shard, 0, reservoir, max_bytes=1_000, until=later())
        assert part.extent == part.clips == 24 and not part.whole
        seen |= {taken.clip.member for taken in reservoir.kept}
    assert statistics.mean(int(name[:3]) for name in seen) == pytest.approx(99.5, abs=15)


def test_a_limit_is_read_no_further_than_it_goes(uneven):
    from dataclasses import replace

    shard = replace(shard_of(uneven), max_clips=7)
    reservoir = Reservoir(20, random.Random(0))
    part = read_part(shard, 0, reservoir, max_bytes=None, until=later())
    assert (part.clips, part.extent, extent_of(shard)) == (7, 7, 7)
    assert sorted(t.clip.member for t in reservoir.kept) == [f"{n:04d}.wav" for n in range(7)]


def test_reading_ends_in_time(uneven):
    part = read_part(
        shard_of(uneven), 0, Reservoir(5, random.Random(0)), max_bytes=None, until=time.monotonic()
    )
    assert not part.whole and part.clips == 1


def test_broken_shards_are_a_clip_that_says_so(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "b.parquet").write_bytes(b"no Parquet at all" * 100)
    for file in sorted(tmp_path.iterdir()):
        reservoir = Reservoir(5, random.Random(0))
        part = read_part(shard_of(file), 0, reservoir, max_bytes=4_000, until=later())
        assert part.clips == 1
        assert reservoir.kept[0].clip.error.type == "BrokenShard"


def test_an_audio_folder_of_many_files_is_sampled_with_its_metadata(tmp_path):
    for number in range(60):
        (tmp_path / f"{number:03d}.wav").write_bytes(b"x" * 100)
    lines = ["file_name,number", *(f"{n:03d}.wav,{n}" for n in range(60))]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    reservoir = Reservoir(60, random.Random(0))
    part = read_part(shard_of(tmp_path), 0, reservoir, max_bytes=1_000, until=later())
    assert part.clips == 24
    for taken in reservoir.kept:
        assert int(taken.clip.metadata["number"]) == int(taken.clip.member[:3])


def test_a_manifest_is_as_large_as_its_rows_are_many(tmp_path):
    for number in range(50):
        (tmp_path / f"{number:03d}.wav").write_bytes(b"x" * 1_000)
    (tmp_path / "m.csv").write_text("path\n" + "\n".join(f"{n:03d}.wav" for n in range(50)))
    (tmp_path / "wav.scp").write_text("\n".join(f"id{n} {n:03d}.wav" for n in range(50)))
    for name in ("m.csv", "wav.scp"):
        shard = shard_of(tmp_path / name)
        assert extent_of(shard) == 50
        part = read_part(shard, 0, Reservoir(5, random.Random(0)), max_bytes=5_000, until=later())
        assert part.clips == part.extent == 5 and not part.whole
        now = time.monotonic()
        part = read_part(shard, 0, Reservoir(5, random.Random(0)), max_bytes=None, until=now)
        assert part.clips == part.extent == 1 and not part.whole
        part = read_part(shard, 0, Reservoir(5, random.Random(0)), max_bytes=None, until=later())
        assert part.clips == part.extent == 50 and part.whole


def test_storage_that_fails_is_not_taken_for_a_damaged_shard(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    shard = Shard("a", str(tmp_path / "a.parquet"), "parquet", 4)

    def gone(*_, **__):
        raise OSError(errno.EIO, "storage does not answer")

    monkeypatch.setattr(pq, "ParquetFile", gone)
    with pytest.raises(OSError, match="does not answer"):
        read_part(shard, 0, Reservoir(5, random.Random(0)), max_bytes=10, until=later())
