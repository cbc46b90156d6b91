"""How batches travel: buffers that nothing overwrites too early, and work beside work."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from student import Student
from student.batches import Answer, Batches, GpuLaunch, Stages
from student.model import NonFiniteScoresError
from transforms.records import Chunk, ClipEnd
from transforms.score import score_clips

SAMPLES = 64


class SleepingDevice:
    """Computes as a GPU does: later, in a thread of its own, one batch after the other.

    It reads its input after it has slept, so a buffer that was used again too early shows.
    Scores are each row's sum; embeddings its length.
    """

    def __init__(self, sleep_s: float = 0.02) -> None:
        self._sleep_s = sleep_s
        self._stream = ThreadPoolExecutor(1)
        self.log: list[str] = []
        self.begun = 0

    def launch(self, waveforms: torch.Tensor, lengths: torch.Tensor, count: int) -> Answer:
        number, self.begun = self.begun, self.begun + 1
        self.log.append(f"begin {number}")

        def compute() -> tuple[torch.Tensor, torch.Tensor]:
            time.sleep(self._sleep_s)
            used = waveforms[:count].sum(dim=1, keepdim=True), lengths[:count, None].float()
            self.log.append(f"computed {number}")
            return used

        future = self._stream.submit(compute)
        return future.result


@pytest.fixture
def device() -> Iterator[SleepingDevice]:
    device = SleepingDevice()
    yield device
    device._stream.shutdown()


def arrays(number: int, *lengths: int) -> list[NDArray[np.float32]]:
    return [np.full(length, number + 1, np.float32) for length in lengths]


def test_short_rows_are_filled_up_by_themselves_where_that_was_asked() -> None:
    rows: list[NDArray[np.float32]] = []

    def launch(waveforms: torch.Tensor, lengths: torch.Tensor, count: int) -> Answer:
        rows.extend(row[:n].numpy().copy() for row, n in zip(waveforms, lengths, strict=True))
        return lambda: (torch.zeros(count, 1), torch.zeros(count, 1))

    sounds = [np.arange(n, dtype=np.float32) for n in (3, 8, 10, 0)]
    Batches(launch, 5, 10, Stages(), fill_samples=8).begin(sounds)()
    expected = [[0, 1, 2, 0, 1, 2, 0, 1], list(range(8)), list(range(10)), [], []]
    assert [row.tolist() for row in rows] == expected


def test_a_second_batch_is_filled_while_the_first_computes(device: SleepingDevice) -> None:
    stages = Stages()
    batches = Batches(device.launch, 3, SAMPLES, stages)
    first = batches.begin(arrays(0, 64, 64, 64))
    second = batches.begin(arrays(1, 10, 5))
    assert device.log == ["begin 0", "begin 1"]
    scores, embeddings = first()
    assert scores[:, 0].tolist() == [64, 64, 64] and embeddings[:, 0].tolist() == [64, 64, 64]
    # Begun into the first one's buffer, while the second still computes: shorter rows, and
    # nothing left of the longer ones before.
    third = batches.begin(arrays(2, 7))
    scores, embeddings = second()
    assert scores[:, 0].tolist() == [20, 10] and embeddings[:, 0].tolist() == [10, 5]
    scores, embeddings = third()
    assert scores[:, 0].tolist() == [21] and embeddings[:, 0].tolist() == [7]
    assert len(batches._free) == 2
    assert stages.take()["transfer"] > 0


def test_threads_share_a_device_without_mixing_batches(device: SleepingDevice) -> None:
    batches = Batches(device.launch, 2, SAMPLES, Stages())
    wrong: list[Any] = []

    def work(number: int) -> None:
        for length in range(1, 9):
            one, other = (batches.begin(arrays(number, length + more)) for more in (0, 20))
            found = [one()[0][0, 0], other()[0][0, 0]]
            expected = [(number + 1) * length, (number + 1) * (length + 20)]
            wrong.extend([] if found == expected else [(number, length, found, expected)])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(batches._free) <= 8  # two a thread


def test_a_batch_that_cannot_begin_gives_its_buffer_back() -> None:
    def full(waveforms: torch.Tensor, lengths: torch.Tensor, count: int) -> Answer:
        raise torch.OutOfMemoryError("CUDA out of memory")

    batches = Batches(full, 2, SAMPLES, Stages())
    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError):
            batches.begin(arrays(0, 3))
    assert len(batches._free) == 1


def test_rows_are_written_while_the_next_batch_computes(
    tiny_student: Student, device: SleepingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tiny_student, "_batches", Batches(device.launch, 2, tiny_student._longest, Stages())
    )
    monkeypatch.setattr(tiny_student, "max_batch", 2)
    monkeypatch.setattr(tiny_student, "under_way", 2)

    def decoded() -> Iterator[Chunk | ClipEnd]:
        for number in range(6):
            yield Chunk(0.0, 1.0, np.full(1_000, number, np.float32))
            yield ClipEnd(f"{number}", 0, None, {})

    scored = []
    for clip in score_clips(decoded(), tiny_student):
        device.log.append(f"row {clip.clip.member}")
        assert clip.scores is not None
        scored.append(float(clip.scores[0]))
    assert scored == [1_000.0 * number for number in range(6)]
    order = device.log.index
    # The second batch was begun before a row of the first was made, the third before one of the second.
    assert order("begin 1") < order("row 0") < order("row 1")
    assert order("begin 2") < order("row 2") < order("row 3")
    # ... and no more than two are under way.
    assert order("computed 0") < order("begin 2")
    assert [line for line in device.log if line.startswith("row")] == [f"row {n}" for n in range(6)]


def test_more_chunks_than_a_batch_are_refused_by_begin(tiny_student: Student) -> None:
    many = [np.zeros(400, np.float32)] * (tiny_student.max_batch + 1)
    with pytest.raises(ValueError, match=r"are more than one batch of \d+; call score"):
        tiny_student.begin(many)


def test_stages_say_where_the_time_went(tiny_student: Student) -> None:
    tiny_student.take_stage_s()
    tiny_student.score([np.zeros(2_000, np.float32)] * 3)
    spent_s = tiny_student.take_stage_s()
    assert list(spent_s) == ["features", "transfer", "model"]
    assert min(spent_s.values()) > 0
    assert set(tiny_student.take_stage_s().values()) == {0.0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA")
def test_a_gpu_scores_as_the_cpu_does_whether_replayed_or_not(
    tiny_checkpoint: Path, noise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small batches, for few and short sounds.
    monkeypatch.setattr("student.model._MAX_BATCH_TOKENS", {"cpu": 4_096, "cuda": 5 * 18})
    here = Student.load(str(tiny_checkpoint), device="cpu")
    gpu = Student.load(str(tiny_checkpoint), device="cuda", dtype="float32")
    waveforms = [noise(400 + 20 * n, n) for n in range(4 * gpu.max_batch + 3)]
    scores, embeddings = gpu.score(waveforms, embeddings=True)
    launch = gpu._batches._launch
    assert isinstance(launch, GpuLaunch) and launch._graph is not None
    expected, expected_embeddings = here.score(waveforms, embeddings=True)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(embeddings, expected_embeddings, rtol=0, atol=1e-3)
    assert min(gpu.take_stage_s().values()) > 0


def test_scores_that_are_no_numbers_are_an_error_and_no_row(
    tiny_checkpoint: Path, noise: Any
) -> None:
    student = Student.load(str(tiny_checkpoint), device="cpu")
    begin = student._batches.begin

    def overflown(arrays: Any) -> Any:
        scores, pooled = begin(arrays)()
        scores = scores.copy()
        scores[-1, 3] = np.nan
        return lambda: (scores, pooled)

    student._batches.begin = overflown  # type: ignore[method-assign]
    with pytest.raises(NonFiniteScoresError, match="no numbers in float32 on cpu: its activations"):
        student.score([noise(2_000), noise(2_000)])
