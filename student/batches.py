"""Batches on their way through a device: filled on the host, begun, and taken back in order.

A GPU computes one batch while the next is filled and copied, and while the rows of the one
before are written. `GpuLaunch` returns at once; on a CPU `launch_here` computes at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from student.features import LogMel

# Features [n, frames, mel bins] to logits [n, labels] and embeddings [n, width].
Forward = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Answer = Callable[[], tuple[torch.Tensor, torch.Tensor]]
# Gets waveforms [size, samples] and lengths [size] on the host, of which the first `count`
# rows are used; gives what waits for the scores and embeddings, [count, ...] on the host.
Launch = Callable[[torch.Tensor, torch.Tensor, int], Answer]


STAGES = ("features", "transfer", "model")


class Stages:
    """Seconds that batches spent in `features`, `transfer` and `model`, safe to add to by threads."""

    def __init__(self) -> None:
        self._spent_s = dict.fromkeys(STAGES, 0.0)
        self._lock = threading.Lock()

    def add(self, **spent_s: float) -> None:
        """Adds seconds to stages."""
        with self._lock:
            for stage, seconds in spent_s.items():
                self._spent_s[stage] += seconds

    def take(self) -> dict[str, float]:
        """Seconds a stage since the last call."""
        with self._lock:
            taken, self._spent_s = self._spent_s, dict.fromkeys(STAGES, 0.0)
        return taken


class Batches:
    """Host buffers of one size, as many as there are batches under way; used again and again.

    Args:
        launch: what computes.
        size: chunks in a batch, at most.
        samples: of the longest chunk.
        stages: where the time of filling the buffers goes.
        fill_samples: a shorter chunk is repeated until it is so long; 0: none is.
        pinned: whether the buffers are page-locked, which a GPU's copies beside its
            computing need.
    """

    def __init__(
        self,
        launch: Launch,
        size: int,
        samples: int,
        stages: Stages,
        fill_samples: int = 0,
        pinned: bool = False,
    ) -> None:
        self._launch = launch
        self._fill_samples = fill_samples
        self._shape = (size, samples)
        self._stages = stages
        self._pinned = pinned
        self._free: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._lock = threading.Lock()

    def begin(
        self, arrays: Sequence[NDArray[np.float32]]
    ) -> Callable[[], tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Begins a batch.

        Args:
            arrays: float32 [samples] each, at most `size` of them.

        Returns:
            What waits for it, once: float32 scores [n, labels], embeddings [n, width].

        Raises:
            torch.OutOfMemoryError: it does not fit the device.
        """
        started = time.perf_counter()
        buffers = self._take()
        waveforms, lengths = buffers
        # numpy's copies, which are of this thread: torch's wait for OpenMP threads on all cores,
        # where decoders are at work, and take 20 times as long.
        rows, samples = waveforms.numpy(), lengths.numpy()
        samples[len(arrays) :] = 0
        for row, array in enumerate(arrays):
            if 0 < len(array) < self._fill_samples:
                array = np.resize(array, self._fill_samples)  # which repeats it
            samples[row] = len(array)
            rows[row, : len(array)] = array
            rows[row, len(array) :] = 0
        self._stages.add(transfer=time.perf_counter() - started)
        try:
            answer = self._launch(waveforms, lengths, len(arrays))
        except BaseException:
            self._give_back(buffers)
            raise

        def result() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            try:
                scores, pooled = answer()
                return scores.numpy(), pooled.numpy()
            finally:
                # Not before: the device may have been reading it.
                self._give_back(buffers)

        return result

    def _take(self) -> tuple[torch.Tensor, torch.Tensor]:
        with self._lock:
            if self._free:
                return self._free.pop()
        size, samples = self._shape
        return (
            torch.zeros((size, samples), pin_memory=self._pinned),
            torch.zeros(size, dtype=torch.int64, pin_memory=self._pinned),
        )

    def _give_back(self, buffers: tuple[torch.Tensor, torch.Tensor]) -> None:
        with self._lock:
            self._free.append(buffers)


def launch_here(log_mel: LogMel, engine: Forward, stages: Stages) -> Launch:
    """Computes on the CPU, at once."""

    @torch.inference_mode()
    def launch(waveforms: torch.Tensor, lengths: torch.Tensor, count: int) -> Answer:
        started = time.perf_counter()
        longest = int(lengths.max())
        features = log_mel(waveforms[:count, :longest], lengths[:count])
        heard = time.perf_counter()
        logits, pooled = engine(features)
        scores = logits.sigmoid()
        stages.add(features=heard - started, model=time.perf_counter() - heard)
        return lambda: (scores, pooled)

    return launch


class GpuLaunch:
    """Computes on a GPU: copies in, computing and copies out each in a stream of its own.

    Batches of the full size have one shape, and from the third on they are replayed as a
    CUDA graph, which spares Python's time for some two hundred kernels; shorter ones,
    a shard's last, are not.

    Args:
        log_mel: on the GPU.
        engine: on the GPU.
        size: chunks in a full batch.
        stages: where the time goes that the GPU took.
    """

    def __init__(self, log_mel: LogMel, engine: Forward, size: int, stages: Stages) -> None:
        self._log_mel, self._engine, self._size, self._stages = log_mel, engine, size, stages
        self._device = log_mel.window.device
        self._in, self._compute, self._out = (torch.cuda.Stream(self._device) for _ in range(3))
        self._full_batches = 0
        self._graph: _Graph | None = None
        self._records = True
        # Threads take turns to launch, so that one batch's activations are in the GPU's memory.
        self._turn = threading.Lock()

    @torch.inference_mode()
    def __call__(self, waveforms: torch.Tensor, lengths: torch.Tensor, count: int) -> Answer:
        """Begins a batch; see `Launch`."""
        with self._turn, torch.cuda.device(self._device):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(5)]
            # Who waits for the last one sleeps: by default it would keep a core busy, which
            # decoders have a use for.
            marks.append(torch.cuda.Event(enable_timing=True, blocking=True))
            with torch.cuda.stream(self._in):
                marks[0].record()
                sound = waveforms[:count].to(self._device, non_blocking=True)
                samples = lengths[:count].to(self._device, non_blocking=True)
                marks[1].record()
            with torch.cuda.stream(self._compute):
                self._compute.wait_event(marks[1])
                for tensor in (sound, samples):
                    tensor.record_stream(self._compute)
                marks[2].record()
                scores, pooled = self._run(sound, samples, marks[3])
                marks[4].record()
            with torch.cuda.stream(self._out):
                self._out.wait_event(marks[4])
                answers = []
                for tensor in (scores, pooled):
                    tensor.record_stream(self._out)
                    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                    answers.append(host.copy_(tensor, non_blocking=True))
                marks[5].record()

        def answer() -> tuple[torch.Tensor, torch.Tensor]:
            marks[5].synchronize()

            def between_s(first: int, second: int) -> float:
                return float(marks[first].elapsed_time(marks[second])) / 1_000

            self._stages.add(
                transfer=between_s(0, 1) + between_s(4, 5),
                features=between_s(2, 3),
                model=between_s(3, 4),
            )
            return answers[0], answers[1]

        return answer

    def _run(
        self, sound: torch.Tensor, samples: torch.Tensor, heard: torch.cuda.Event
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and embeddings on the GPU; `heard` is recorded after the features."""
        features = self._log_mel(sound, samples)
        heard.record()
        if len(features) != self._size:
            return _score(self._engine, features)
        self._full_batches += 1
        if self._full_batches <= 2:  # recording takes the time of some batches
            return _score(self._engine, features)
        if self._graph is None and self._records:
            try:
                self._graph = _Graph(self._engine, features, self._compute)
            except torch.OutOfMemoryError:
                # A graph keeps activations of its own. Batches go on without, at full size.
                self._records = False
        return _score(self._engine, features) if self._graph is None else self._graph(features)


class _Graph:
    """The engine on one shape, recorded once and replayed."""

    def __init__(self, engine: Forward, features: torch.Tensor, stream: torch.cuda.Stream) -> None:
        self._features = features.clone()
        # In this thread, whichever had the batches before: cuDNN and cuBLAS have handles and
        # memory for each thread, which cannot be made while a graph is recorded.
        _score(engine, self._features)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may allocate page-locked memory meanwhile.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._answer = _score(engine, self._features)

    def __call__(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._features.copy_(features)
        self._graph.replay()
        # The next replay writes over the recorded ones while these are still being copied.
        return self._answer[0].clone(), self._answer[1].clone()


def _score(engine: Forward, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits, pooled = engine(features)
    return logits.sigmoid(), pooled
