"""What a clip costs beside decoding, features and model, counted and not timed.

Beam moves shards and never clips; each clip is read, decoded and scored once, in full batches;
between decoder and student a waveform is copied once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from apache_beam.metrics.monitoring_infos import extract_counter_value
from numpy.typing import NDArray

from pipeline.options import AnnotateOptions
from pipeline.run import annotate, annotation_of, empty_pipeline, prepare
from student.model import Student
from transforms import decode
from transforms.annotate import _decoded, _Watches
from transforms.decode import DEFAULT_LIMITS
from transforms.read import read_clips
from transforms.readahead import read_ahead
from transforms.records import Chunk, Shard
from transforms.score import score_clips

Waveform = NDArray[np.float32]

ELEMENTS = "beam:metric:element_count:v1"
COPIES = 1  # where the decoder's blocks are joined to a chunk


@pytest.fixture
def shard_of(
    tmp_path: Path,
    make_tar: Callable[..., Path],
    encoded: Callable[..., bytes],
    noise: Callable[..., Waveform],
) -> Callable[..., Path]:
    """A tar of so many short clips, in a folder of its own."""

    def make(clips: int, samples: int = 2_000) -> Path:
        members = [
            (f"{i:04}.flac", encoded(noise(samples, seed=i), format="flac")) for i in range(clips)
        ]
        (tmp_path / f"in-{clips}").mkdir()
        return make_tar(tmp_path / f"in-{clips}" / "short.tar", members)

    return make


@pytest.fixture
def run(tmp_path: Path, tiny_checkpoint: Path) -> Callable[[Path], Any]:
    """Runs the pipeline over a shard, as the command does; gives Beam's result."""

    def annotated(shard: Path) -> Any:
        output = tmp_path / f"out-{shard.parent.name}"
        # A thread decodes, so that what it does can be counted here.
        options = AnnotateOptions(
            (str(shard),), str(output), str(tiny_checkpoint), device="cpu", decode_processes=0
        )
        job = prepare(options)
        root = empty_pipeline(job.beam_options)
        annotate(root, job.todo, annotation_of(job, None))
        result = root.run()
        result.wait_until_finish()
        assert len(list((output / "clips").glob("*.parquet"))) == 1
        return result

    return annotated


def elements(result: Any) -> list[int]:
    """How many elements went through each of the pipeline's collections."""
    counted: Counter[str] = Counter()
    for info in result.monitoring_infos():
        if info.urn == ELEMENTS:
            counted[info.labels["PCOLLECTION"]] += extract_counter_value(info)
    return sorted(counted.values())


def test_no_clip_crosses_a_boundary_of_beam(
    run: Callable[[Path], Any], shard_of: Callable[..., Path]
) -> None:
    few, many = elements(run(shard_of(2))), elements(run(shard_of(30)))
    assert few, "Beam has counted nothing"
    assert many == few
    assert max(many) == 1  # one shard


def test_a_clip_is_decoded_once_and_batches_are_full(
    run: Callable[[Path], Any],
    shard_of: Callable[..., Path],
    tiny_student: Student,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clips = 2 * tiny_student.max_batch + 3
    shard = shard_of(clips)
    counts: Counter[str] = Counter()
    batches: list[int] = []

    def counting(owner: Any, name: str, what: str) -> None:
        counted = getattr(owner, name)

        def call(*given: Any, **named: Any) -> Any:
            counts[what] += 1
            return counted(*given, **named)

        monkeypatch.setattr(owner, name, call)

    counting(decode.av, "open", "containers")
    counting(decode.soundfile, "SoundFile", "containers")
    counting(decode.AudioDecoder, "__init__", "decoders")
    begin = Student.begin

    def begun(student: Student, waveforms: Sequence[Waveform]) -> Any:
        batches.append(len(waveforms))
        return begin(student, waveforms)

    monkeypatch.setattr(Student, "begin", begun)
    result = run(shard)
    assert counts == {"containers": clips, "decoders": clips}
    assert len(batches) == math.ceil(clips / tiny_student.max_batch)
    assert batches == [tiny_student.max_batch] * 2 + [3]
    observed = {d.key.metric.name: d.result for d in result.metrics().query()["distributions"]}
    assert observed["inference_request_batch_size"].count == len(batches)


class Watched(np.ndarray):  # type: ignore[type-arg]
    """An array that tells of every array that is made from it."""

    __array_priority__ = 1.0  # what is joined to one is one
    made: ClassVar[list[Watched]] = []

    def __array_finalize__(self, origin: Any) -> None:
        self.made.append(self)


def test_a_waveform_is_copied_once_between_decoder_and_student(
    shard_of: Callable[..., Path], tiny_student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, clips = 2_000, 5
    mono = decode.AudioDecoder.mono

    def watched(decoder: decode.AudioDecoder, *asked: Any) -> Iterator[Waveform]:
        for block in mono(decoder, *asked):
            yield block.view(Watched)

    monkeypatch.setattr(decode.AudioDecoder, "mono", watched)
    monkeypatch.setattr(Watched, "made", [])
    cut: list[Waveform] = []
    taken: list[Waveform] = []
    begin = Student.begin

    def begun(student: Student, waveforms: Sequence[Waveform]) -> Any:
        taken.extend(waveforms)
        return begin(student, waveforms)

    monkeypatch.setattr(Student, "begin", begun)

    def noted(events: Any) -> Iterator[Any]:
        for event in events:
            if isinstance(event, Chunk):
                cut.append(event.waveform)
            yield event

    path = shard_of(clips, samples)
    shard = Shard("short", str(path), "tar", path.stat().st_size)
    decoded = noted(
        _decoded(read_clips(shard), tiny_student.features, DEFAULT_LIMITS, None, _Watches(), None)
    )
    scored = list(score_clips(read_ahead(decoded, 64), tiny_student))
    assert len(scored) == len(cut) == len(taken) == clips
    # The student gets the very arrays that were cut, and copies them once, into its batch.
    assert all(a is b for a, b in zip(cut, taken, strict=True))
    copies = [array for array in Watched.made if array.base is None and array.size >= samples]
    assert len(copies) == COPIES * clips
