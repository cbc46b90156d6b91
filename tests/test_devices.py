"""A worker process for each device: how many there are, and which has which."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from apache_beam.options.pipeline_options import DirectOptions

from pipeline.dataflow import NO_GPU, Workers
from pipeline.devices import computed_by, processor_of
from pipeline.options import AnnotateOptions, UsageError
from pipeline.run import annotation_of, prepare
from student.engine import choose_kernel
from transforms.annotate import _devices_here
from transforms.claim import claim_number

WORKERS = Workers(NO_GPU, 0, "cpu", "float32")
CLAIM = """
import sys
from pathlib import Path
from transforms.claim import claim_number
print(claim_number(Path(sys.argv[1]), 2), flush=True)
print(claim_number(Path(sys.argv[1]), 2), flush=True)
sys.stdin.read()
"""


def claimant(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def numbers(process: subprocess.Popen[str]) -> tuple[int, int]:
    assert process.stdout is not None
    return int(process.stdout.readline()), int(process.stdout.readline())


def test_each_process_has_a_number_of_its_own_until_it_ends(tmp_path: Path) -> None:
    first, second = claimant(tmp_path), claimant(tmp_path)
    try:
        # A process that asks again is told the same.
        assert sorted([numbers(first), numbers(second)]) == [(0, 0), (1, 1)]
        _, refusal = claimant(tmp_path).communicate()
        assert "all 2 worker processes of this run are there" in refusal
        first.kill()
        first.wait()
        third = claimant(tmp_path)
        assert numbers(third) in [(0, 0), (1, 1)]
        third.communicate()
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


@pytest.fixture
def asked(
    tmp_path: Path, tiny_checkpoint: Path, make_tar: Callable[..., Path],
    encoded: Callable[..., bytes], noise: Callable[..., Any],
) -> Callable[..., Any]:  # fmt: skip
    """The job that `earmark annotate` would run with these options, or its refusal."""
    clip = encoded(noise(4_000))
    tars = [str(make_tar(tmp_path / f"{name}.tar", [("a.wav", clip)])) for name in "abcd"]

    def prepared(**options: Any) -> Any:
        given = {"inputs": tuple(tars), "output": str(tmp_path / "out"), "dry_run": True}
        return prepare(AnnotateOptions(**{"checkpoint": str(tiny_checkpoint), **given, **options}))

    return prepared


def gpus(count: int, monkeypatch: pytest.MonkeyPatch, memory_gb: int = 15) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    facts = SimpleNamespace(total_memory=memory_gb << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: facts)


def test_devices_all_is_a_process_for_each_gpu(
    asked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(4, monkeypatch)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    job = asked(devices="all")
    beam = job.beam_options.view_as(DirectOptions)
    assert (beam.direct_num_workers, beam.direct_running_mode) == (4, "multi_processing")
    annotation = annotation_of(job, None)
    assert (annotation.device, annotation.worker_processes) == ("cuda", 4)
    assert annotation.decode_processes == 15  # of 16 cores a GPU, one is Python's
    two = asked(devices="2").workers
    assert (two.processes, two.decode_processes) == (2, 31)
    assert asked().workers.processes == 1  # as ever: one process deals its threads over the GPUs
    assert asked(decode_processes=3).workers.decode_processes == 3


def test_processes_share_a_gpu_that_is_faster_than_one_python(
    asked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpus(1, monkeypatch, memory_gb=140)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    job = asked()
    assert (job.workers.processes, job.workers.devices, job.workers.decode_processes) == (4, 1, 4)
    assert job.beam_options.view_as(DirectOptions).direct_num_workers == 4
    first = claimant(tmp_path)  # has number 0
    assert numbers(first) == (0, 0)
    assert _devices_here(annotation_of(job, str(tmp_path))) == ["cuda:0"]
    first.communicate()
    # One shard is one process's, which then has all the cores.
    alone = asked(inputs=(str(tmp_path / "a.tar"),)).workers
    assert (alone.processes, alone.decode_processes) == (1, 15)
    by_hand = asked(beam=("--direct_num_workers=2", "--direct_running_mode=multi_processing"))
    assert by_hand.workers.processes == 1  # what Beam was told holds
    assert by_hand.beam_options.view_as(DirectOptions).direct_num_workers == 2
    assert by_hand.workers.decode_processes == 7  # of 8 cores each
    two = asked(processes_per_gpu=2).workers
    assert (two.processes, two.decode_processes) == (2, 8)
    one = asked(processes_per_gpu=1)
    assert (one.workers.processes, one.workers.decode_processes) == (1, 15)
    assert one.beam_options.view_as(DirectOptions).direct_running_mode == "in_memory"
    with pytest.raises(UsageError, match="--processes-per-gpu is for a run on a GPU of this"):
        asked(processes_per_gpu=2, beam=("--direct_num_workers=2",))
    with pytest.raises(UsageError, match="--processes-per-gpu is for a run on a GPU of this"):
        asked(processes_per_gpu=2, device="cpu")
    gpus(1, monkeypatch, memory_gb=22)
    assert asked().workers.processes == 2  # students and contexts have to fit
    gpus(2, monkeypatch, memory_gb=140)
    both = asked(devices="all").workers
    assert (both.processes, both.devices, both.decode_processes) == (4, 2, 4)
    second = asked(device="cuda:1")
    assert second.workers.processes == 4
    assert _devices_here(annotation_of(second, str(tmp_path))) == ["cuda:1"]


def test_no_process_is_started_without_a_shard_for_it(
    asked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpus(4, monkeypatch)
    job = asked(devices="all", inputs=(str(tmp_path / "a.tar"), str(tmp_path / "b.tar")))
    assert job.workers.processes == job.beam_options.view_as(DirectOptions).direct_num_workers == 2
    job = asked(devices="all", inputs=(str(tmp_path / "a.tar"),))
    assert job.workers.processes == job.beam_options.view_as(DirectOptions).direct_num_workers == 1


def test_what_computed_is_named_and_why_reduced_is_float32() -> None:
    narrow = replace(WORKERS, dtype="float32")
    assert computed_by(narrow, "auto", 192) == {
        "device": "cpu",
        "processor": processor_of(torch.device("cpu")),
        "kernel": choose_kernel(torch.device("cpu"), hidden_size=192),
    }
    assert "nothing faster" in computed_by(narrow, "reduced", 192)["dtype"]
    assert processor_of(torch.device("cpu"))


def test_a_process_takes_the_gpu_of_its_number(
    asked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpus(4, monkeypatch)
    first = claimant(tmp_path)
    assert numbers(first) == (0, 0)
    annotation = annotation_of(asked(devices="all"), str(tmp_path))
    assert _devices_here(annotation) == ["cuda:1"]
    assert claim_number(tmp_path, 4) == 1
    first.communicate()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"devices": "all"}, "it has none that torch can use; for several processes on its CPU"),
        ({"devices": "0", "device": "cpu"}, "--devices '0': expected all, or a number up to the"),
        ({"devices": "1000", "device": "cpu"}, "--devices '1000': expected all, or a number"),
        ({"devices": "two", "device": "cpu"}, "--devices 'two': expected all, or a number"),
        (
            {"devices": "1", "device": "cpu", "beam": ("--runner=PortableRunner",)},
            "a cluster has its own workers",
        ),
    ],
)
def test_devices_that_are_not_there_are_refused(
    asked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str
) -> None:
    gpus(0, monkeypatch)
    with pytest.raises(UsageError, match=said):
        asked(**options)


def test_devices_and_what_contradicts_them(
    asked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(2, monkeypatch)
    with pytest.raises(UsageError, match="--devices all and --device cuda:1 contradict each other"):
        asked(devices="all", device="cuda:1")
    with pytest.raises(UsageError, match="sets --direct_num_workers and --direct_running_mode"):
        asked(devices="all", beam=("--direct_num_workers=3",))
    with pytest.raises(UsageError, match="--dtype reduced is what is fastest on this machine"):
        asked(
            dtype="reduced", output="gs://b/o",
            beam=("--runner=DataflowRunner", "--project=p", "--region=us-central1", "--temp_location=gs://b/t"),
        )  # fmt: skip
