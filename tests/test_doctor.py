"""`earmark doctor`: what is wrong is found, said with its cure, and stops no other check."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.stand_ins import CloudStorage, ImageRegistry
from pipeline import doctor
from pipeline.dataflow import BEAM_VERSION, PYTHON_VERSION


@pytest.fixture
def look(earmark, tiny_checkpoint):
    """The checks of a command, by name."""

    def run(*arguments: object, env: dict[str, str] | None = None, code: int = 0) -> dict:
        if "--checkpoint" not in arguments:
            arguments = (*arguments, "--checkpoint", tiny_checkpoint)
        said = earmark(env or {}, "doctor", *arguments, "--json", code=code)
        return {check["name"]: check for check in json.loads(said)}

    return run


@pytest.fixture(scope="module")
def tar(tmp_path_factory, make_tar, encoded, noise) -> Path:
    return make_tar(tmp_path_factory.mktemp("in") / "a.tar", [("a.wav", encoded(noise(16_000)))])


def test_here_all_is_well(look, tar, tmp_path):
    found = look(tar, "--output", tmp_path / "new")
    assert {check["status"] for check in found.values()} <= {"ok", "warn"}
    for name in (
        "python",
        "packages",
        "device",
        "student",
        f"input {tar}",
        f"output {tmp_path / 'new'}",
    ):
        assert found[name]["status"] == "ok", found[name]
    assert not (tmp_path / "new").exists()
    assert "a.wav, pcm_s16le, 16000 Hz, 1.0 s" in found[f"input {tar}"]["found"]


def test_what_a_person_sees(earmark, tiny_checkpoint, tmp_path):
    said = earmark({}, "doctor", tmp_path / "none", "--checkpoint", tiny_checkpoint, code=1)
    assert "ok    python: " in said
    assert f"fail  input {tmp_path / 'none'}: " in said and "does not exist" in said
    assert "1 failed" in said.splitlines()[-1]
    assert "      Correct the path" in said


@pytest.mark.parametrize("name", doctor.CODECS)
def test_each_codec_is_tried(name):
    assert doctor.codec(name) == doctor.Check(f"codec {name}", "ok", "decodes")


def test_a_codec_that_gives_something_else_fails(monkeypatch):
    monkeypatch.setattr("transforms.decode._resampled", lambda _, block, *__, **___: block)
    assert doctor.codec("opus").status == "fail"  # three times as long: 48 kHz taken for 16


def test_a_codec_that_cannot_be_encoded_is_a_warning(monkeypatch):
    monkeypatch.setitem(doctor.CODECS, "mp3", ("mp3", "libnone", 16_000))
    found = doctor.codec("mp3")
    assert found.status == "warn" and "libnone" in found.found


def test_a_package_that_is_too_old_or_missing_fails(monkeypatch):
    version = importlib.metadata.version

    def other(name: str) -> str:
        if name == "rich":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0.1" if name == "numpy" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", other)
    found = [check.found for check in doctor.packages()]
    assert "numpy is 1.0.1, expected >=1.26" in found
    assert "rich>=13.9 is missing" in found
    assert all(check.status == "fail" and check.cure for check in doctor.packages())


def test_another_python_fails(monkeypatch):
    monkeypatch.setattr("platform.python_version", lambda: "3.8.1")
    found = doctor.python()
    assert found.status == "fail" and "3.8.1, and earmark needs" in found.found


def test_a_device_that_is_missing_fails(look):
    found = look("--device", "cuda:7", code=1)
    assert found["device"]["status"] == found["student"]["status"] == "fail"
    assert "cuda:7" in found["device"]["found"]
    assert "--device" in found["student"]["cure"]


def test_a_container_s_limits_are_seen(monkeypatch, tmp_path):
    file = tmp_path / "cpu.max"
    file.write_text("150000 100000\n")
    assert doctor.cgroup_cores(str(file)) == 1.5
    file.write_text("max 100000\n")
    assert doctor.cgroup_cores(str(file)) is None
    assert doctor.cgroup_cores(str(tmp_path / "none")) is None
    file.write_text("1048576\n")
    assert doctor.cgroup_bytes(str(file)) == 1 << 20
    monkeypatch.setattr(doctor, "cgroup_cores", lambda: 0.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    found = doctor.cores()
    assert found.status == "warn" and "export OMP_NUM_THREADS=1" in found.cure


def test_too_little_memory_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "cgroup_bytes", lambda: 64 << 20)
    found = doctor.memory("bundled")
    assert found.status == "warn" and "may use 67.1 MB" in found.found


@pytest.mark.parametrize(
    ("free", "status"), [(1 << 40, "ok"), (1 << 30, "warn"), (1 << 20, "fail")]
)
def test_room_on_a_disk(monkeypatch, free, status):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert doctor.temporary_folder().status == status


def test_a_checkpoint_that_is_none_fails(look, tmp_path):
    found = look("--checkpoint", tmp_path, code=1)
    assert found["student"]["status"] == "fail" and "config.json" in found["student"]["found"]


def test_an_input_whose_first_clip_is_broken_is_a_warning(look, make_tar, tmp_path):
    tar = make_tar(tmp_path / "b.tar", [("a.flac", b"fLaC no more")])
    found = look(tar)[f"input {tar}"]
    assert found["status"] == "warn" and "a.flac" in found["found"]


def test_an_output_that_cannot_be_written_fails(look, tmp_path):
    (tmp_path / "file").write_text("in the way")
    found = look("--output", tmp_path / "file" / "out", code=1)
    assert found[f"output {tmp_path / 'file' / 'out'}"]["status"] == "fail"


def test_buckets_are_listed_read_and_written_only_as_output(look, tar):
    with CloudStorage("in", "out") as cloud:
        cloud.put("in", "a.tar", tar.read_bytes())
        found = look("gs://in/a.tar", "--output", "gs://out/tags", env=cloud.env)
        assert found["input gs://in/a.tar"]["status"] == "ok"
        assert found["output gs://out/tags"]["status"] == "ok"
        assert cloud.names("out") == [] and cloud.names("in") == ["a.tar"]
        written = [r.path for r in cloud.requests if r.method in ("POST", "PUT", "DELETE")]
        assert any("/out" in path for path in written)
        assert not any("/in/" in path for path in written)


def test_a_bucket_that_refuses_fails_with_its_cure(look, tar):
    with CloudStorage("in") as cloud:
        cloud.put("in", "a.tar", tar.read_bytes())
        found = look("gs://in/none/*.tar", "gs://absent/a.tar", env=cloud.env, code=1)
        for path in ("gs://in/none/*.tar", "gs://absent/a.tar"):
            assert found[f"input {path}"]["status"] == "fail"
            assert "roles/storage.objectViewer" in found[f"input {path}"]["cure"]


def test_an_image_is_asked_for_its_versions(look):
    versions = {"earmark.python": PYTHON_VERSION, "earmark.beam": BEAM_VERSION}
    images = {"p/r/fits:1": versions, "p/r/old:1": versions | {"earmark.beam": "2.1.0"}}
    with ImageRegistry(images) as registry:
        assert look("--image", f"{registry.host}/p/r/fits:1")["image"]["status"] == "ok"
        found = look("--image", f"{registry.host}/p/r/old:1", code=1)["image"]
        assert found["status"] == "fail" and "has beam 2.1.0" in found["found"]
    found = look("--image", "docker.io/some/where")["image"]
    assert found["status"] == "warn" and "not checked" in found["found"]


def test_a_check_that_breaks_or_hangs_is_a_failure_and_no_more():
    def broken() -> doctor.Checks:
        raise RuntimeError("no such luck\nand more")

    assert doctor.guarded("a", broken) == [doctor.Check("a", "fail", "RuntimeError: no such luck")]
    (hung,) = doctor.guarded("b", lambda: time.sleep(5) or (), within_s=0.05)
    assert (hung.name, hung.status) == ("b", "fail") and "no answer within" in hung.found
