from __future__ import annotations

from pathlib import Path

import pytest
import webdataset
from braceexpand import braceexpand

from bench.stand_ins import CloudStorage
from transforms.braces import expand_braces, has_braces
from transforms.listing import InputError
from transforms.shards import plan_shards


@pytest.mark.parametrize(
    "pattern",
    [
        *("x-{000000..000012}.tar", "x-{9..11}.tar", "x-{00..3}.tar", "x-{3..1}", "x-{0..10..4}"),
        *("{a,b}/x-{0..2}.tar", "a{b,c{d,e}}f", "{a,b{1..3}}", "{x}", "{}", "a", "", "{a..e}"),
        *(
            "a{,b}",
            "{a,b",
            "{-2..1}",
            "{01..1}",
            "x{1..2}{3..4}",
            "{{a,b},c}",
            "a,b",
            "{1..2",
            "}{",
        ),
    ],
)
def test_braces_expand_as_webdataset_has_them(pattern: str) -> None:
    try:
        expected = list(braceexpand(pattern))
    except ValueError:  # unbalanced ones, which are part of a name here
        expected = [pattern]
    assert list(expand_braces(pattern)) == expected
    assert has_braces(pattern) == (expected != [pattern])


def test_webdataset_names_the_same_shards() -> None:
    pattern = "gs://b/{train,val}-{000..011}.tar"
    assert list(expand_braces(pattern)) == webdataset.shardlists.expand_urls(pattern)


def test_a_million_names_come_one_by_one() -> None:
    names = expand_braces("x-{000000..999999}.tar")
    assert [next(names), next(names)] == ["x-000000.tar", "x-000001.tar"]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_the_files_of_braces_are_shards_in_their_order(tmp_path: Path) -> None:
    touch(tmp_path, *(f"x-{n:03d}.tar" for n in range(13)), "y/a.wav", "y/b.wav", "z/a.wav")
    planned = plan_shards([f"{tmp_path}/x-{{010..008}}.tar"]).shards
    assert [Path(shard.uri).name for shard in planned] == ["x-010.tar", "x-009.tar", "x-008.tar"]
    assert planned == plan_shards([s.uri for s in planned]).shards
    (loose,) = plan_shards([f"{tmp_path}/{{y,z}}/a.wav"]).shards
    assert (loose.uri, loose.files) == (str(tmp_path), ("y/a.wav", "z/a.wav"))
    folders = plan_shards([f"{tmp_path}/{{y,z}}"]).shards
    assert [shard.files for shard in folders] == [("a.wav", "b.wav"), ("a.wav",)]
    globs = plan_shards([f"{tmp_path}/{{y,z}}/*.wav"]).shards
    assert [shard.files for shard in globs] == [("a.wav", "b.wav"), ("a.wav",)]


def test_a_missing_member_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "x-0.tar", "x-2.tar", "y/a.tar")
    pattern = f"{tmp_path}/x-{{0..2}}.tar"
    with pytest.raises(InputError) as refusal:
        plan_shards([pattern])
    missing = f"{tmp_path}/x-1.tar"
    assert str(refusal.value) == f"{pattern!r} names what is not there: {missing!r} does not exist"
    with pytest.raises(InputError, match=r"z' does not exist"):
        plan_shards([f"{tmp_path}/{{y,z}}"])


def test_a_file_whose_name_has_braces_is_itself(tmp_path: Path) -> None:
    touch(tmp_path, "x-{0,1}.tar", "x-0.tar", "x-{}.wav")
    (shard,) = plan_shards([f"{tmp_path}/x-{{0,1}}.tar"]).shards
    assert shard.uri == f"{tmp_path}/x-{{0,1}}.tar"
    (shard,) = plan_shards([f"{tmp_path}/x-{{}}.wav"]).shards
    assert shard.files == ("x-{}.wav",)


def test_braces_in_cloud_storage_cost_a_listing(lead_to) -> None:
    with CloudStorage("in") as cloud:
        lead_to(cloud.env)
        cloud.put_many("in", [f"a/x-{n:05}.tar" for n in range(1_500)])
        cloud.put_many("in", [f"a/{s}/deep/0.tar" for s in "pq"])
        planned = plan_shards(["gs://in/a/x-{00000..01399}.tar"]).shards
        assert [s.uri for s in planned] == [f"gs://in/a/x-{n:05}.tar" for n in range(1_400)]
        assert planned[0].checksum is not None
        assert len(cloud.requests) <= 3
        planned = plan_shards(["gs://in/a/{p,q}/deep/{0..0}.tar"]).shards
        assert [s.uri for s in planned] == ["gs://in/a/p/deep/0.tar", "gs://in/a/q/deep/0.tar"]
        with pytest.raises(InputError, match=r"'gs://in/a/x-01500\.tar' does not exist"):
            plan_shards(["gs://in/a/x-{00000..01500}.tar"])


def test_a_command_is_refused() -> None:
    with pytest.raises(InputError) as refusal:
        plan_shards(["pipe:gsutil cat gs://b/x-{0..3}.tar"])
    assert str(refusal.value) == (
        "'pipe:gsutil cat gs://b/x-{0..3}.tar' is a command, and no command is run: name the files or "
        "URLs themselves"
    )
