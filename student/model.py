"""The student: waveforms in, scores out."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray

from student import BUNDLED
from student.batches import Batches, Forward, GpuLaunch, Launch, Stages, launch_here
from student.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from student.engine import Engine, choose_kernel
from student.feature_spec import FRAME_SAMPLES, HOP_SAMPLES, FeatureSpec
from student.features import LogMel
from student.labels import Label
from student.openvino import can_compile, compile_network
from student.weights import Network, network_of, read_network

if TYPE_CHECKING:
    from transformers import ASTForAudioClassification

logger = logging.getLogger(__name__)

Result = Callable[[], tuple[NDArray[np.float32], NDArray[np.float32]]]
Waveforms = NDArray[np.float32] | Sequence[NDArray[np.float32]]
Pad = Literal["zero", "repeat"]

PADS: tuple[Pad, ...] = ("zero", "repeat")

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
TOLERANCE = 0.01  # how far a score may be from float32's in less precision
# Narrower students gain nothing from int8, and lose more: fewer products average its rounding.
_INT8_LEAST_WIDTH = 512
_int8_differences: dict[tuple[str, str], float] = {}  # by the hashes of weights and config

# How many tokens (patches of a spectrogram) go through the model at once. A CPU
# gains nothing past its caches; a GPU wants to be full, and 64 chunks of a
# 1,214-token student with bf16 activations stay under 4 GB.
_MAX_BATCH_TOKENS = {"cpu": 4_096, "cuda": 77_696}


class DeviceError(RuntimeError):
    """The device that was asked for is not there; never replaced by another one."""


class NonFiniteScoresError(RuntimeError):
    """A student gave scores that are no numbers; they are never written."""


class Student:
    """An AST classifier on a device, with the features it was trained on.

    Attributes:
        checkpoint: where the weights came from, and the facts beside them.
        device: where the model runs.
        dtype: what its matrix products are in; features and scores are float32 always.
        pad: how a waveform shorter than a chunk is made as long as one, see `load`.
        kernel: who multiplies matrices, of `student.engine`.
        max_batch: chunks that go through the model at once.
        under_way: batches that are worth beginning before the first answer is taken.
    """

    def __init__(
        self,
        network: Network,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        pad: Pad = "zero",
    ) -> None:
        if pad not in PADS:
            raise ValueError(f"pad is {pad!r}, expected {' or '.join(map(repr, PADS))}")
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.pad = pad
        self.kernel = choose_kernel(device, dtype, network.hidden_size)
        if self.kernel == "openvino" and not can_compile(network):
            self.kernel = choose_kernel(device, dtype, has_openvino=False)
        self.embedding_size = network.hidden_size  # 768 for Distil-AST
        self.parameters = network.parameters  # 44,066,831 for Distil-AST
        if device.type == "cuda" and dtype is torch.float32:
            # float32 that was asked for is not to be TF32's 10 bits of mantissa.
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        self.max_batch = max(1, _MAX_BATCH_TOKENS[device.type] // network.tokens)
        self.under_way = 2 if device.type == "cuda" else 1
        self._longest = (self.features.max_length - 1) * HOP_SAMPLES + FRAME_SAMPLES
        self._stages = Stages()
        # A tone's features are 4e-4 off in float32, as much as float16 rounds off and a fifth of
        # what bfloat16 does.
        rounded = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
        spectrum_dtype = torch.float32 if rounded else torch.float64
        self._log_mel = LogMel(checkpoint.features, spectrum_dtype).to(device)
        engine: Forward
        if self.kernel == "openvino":
            engine = compile_network(network, self.features)
        else:
            engine = Engine(network, device, dtype, self.kernel)
        launch: Launch
        if device.type == "cuda":
            launch = GpuLaunch(self._log_mel, engine, self.max_batch, self._stages)
        else:
            launch = launch_here(self._log_mel, engine, self._stages)
        self._batches = Batches(
            launch,
            self.max_batch,
            self._longest,
            self._stages,
            fill_samples=self.features.chunk_samples if pad == "repeat" else 0,
            pinned=device.type == "cuda",
        )
        self._halvings = 0
        self._fitting = self.max_batch  # less once a batch did not fit

    @classmethod
    def load(
        cls,
        checkpoint: str = BUNDLED,
        device: str = "auto",
        dtype: str = "auto",
        pad: Pad = "zero",
    ) -> Student:
        """Loads a checkpoint onto a device.

        Args:
            checkpoint: `bundled`, a local directory, or a Hugging Face id such as
                `bookbot/distil-ast-audioset` (`owner/name@revision` pins one).
            device: `auto` (CUDA where there is one, else the CPU), `cpu`, `cuda` or
                `cuda:N`.
            dtype: `auto` (float32 on the CPU; bfloat16 on CUDA, float16 on cards
                older than Ampere), `reduced` (the fastest that is to keep scores
                within `TOLERANCE`, on a CPU too: see `settle_dtype`), `float32`, `bfloat16`, `float16` or `int8`
                (its layers' products on a CPU with VNNI, checked against float32 here
                on a few made sounds).
            pad: what stands after a waveform shorter than a chunk. `zero` is zeros after the
                features, before their normalisation, as AST was trained and evaluated;
                `repeat` the waveform again and again, before the features, until a chunk
                is full. The waveform alone decides it, not its batch or the device.

        Raises:
            CheckpointError: the checkpoint is missing or unusable.
            DeviceError: the device is missing, or cannot compute in `dtype`.
            ValueError: `pad` is neither.
        """
        place = choose_device(device)
        facts = read_checkpoint(checkpoint)
        precision = settle_dtype(dtype, place, facts)
        student = cls(load_network(facts), facts, place, precision, pad)
        logger.info(
            "loaded %s on %s in %s", checkpoint, place, str(precision).removeprefix("torch.")
        )
        return student

    @property
    def labels(self) -> tuple[Label, ...]:
        """The labels, in the order of the scores."""
        return self.checkpoint.labels

    @property
    def features(self) -> FeatureSpec:
        """Sample rate, mel bins and chunk length of this student."""
        return self.checkpoint.features

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights as they are on the device, but for what is float32 always."""
        return int(self.parameters * self.dtype.itemsize)

    def take_halvings(self) -> int:
        """How often a batch was cut in two for want of GPU memory, since the last call."""
        taken, self._halvings = self._halvings, 0
        return taken

    def take_stage_s(self) -> dict[str, float]:
        """Seconds in `features`, `transfer` (copies) and `model` since the last call.

        On a GPU these are its own seconds, not those of the thread that waits for it.
        """
        return self._stages.take()

    @overload
    def score(self, waveforms: Waveforms) -> NDArray[np.float32]: ...

    @overload
    def score(
        self, waveforms: Waveforms, *, embeddings: Literal[True]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...

    def score(
        self, waveforms: Waveforms, *, embeddings: bool = False
    ) -> NDArray[np.float32] | tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Scores chunks of audio.

        Args:
            waveforms: float32 [n, samples], or n arrays [samples] of their own
                lengths: mono, in [-1, 1], at `features.sample_rate` (16 kHz). Each is
                at most one chunk long (`features.chunk_samples`); a shorter one is
                padded as `load` says of `pad`.
            embeddings: whether to return embeddings too.

        Returns:
            Scores, float32 [n, labels]: the sigmoid of each logit, whatever
            `problem_type` the checkpoint states. With `embeddings` also float32
            [n, embedding_size]: the pooled vector after the final norm.

        Raises:
            ValueError: a waveform is not one-dimensional, is too long, or holds NaN
                or infinity.
            NonFiniteScoresError: scores are no numbers.
        """
        arrays = self._checked(waveforms)
        scores = np.empty((len(arrays), len(self.labels)), np.float32)
        pooled = np.empty((len(arrays), self.embedding_size), np.float32)
        begun: deque[tuple[slice, Result]] = deque()
        for start in range(0, len(arrays), self.max_batch):
            rows = slice(start, start + self.max_batch)
            begun.append((rows, self._begin(arrays[rows])))
            if len(begun) == self.under_way:
                rows, result = begun.popleft()
                scores[rows], pooled[rows] = result()
        for rows, result in begun:
            scores[rows], pooled[rows] = result()
        return (scores, pooled) if embeddings else scores

    def begin(self, waveforms: Waveforms) -> Result:
        """Begins to score at most `max_batch` chunks, and waits for nothing on a GPU.

        Args:
            waveforms: as for `score`. They are copied: the caller may use them again.

        Returns:
            To be called once: waits, and gives scores and embeddings as `score` does.

        Raises:
            ValueError: as `score`, or there are too many.
        """
        if len(waveforms) > self.max_batch:
            raise ValueError(
                f"{len(waveforms)} chunks are more than one batch of {self.max_batch}; call score"
            )
        return self._begin(self._checked(waveforms))

    def _checked(self, waveforms: Waveforms) -> list[NDArray[np.float32]]:
        arrays = [np.asarray(waveform, dtype=np.float32) for waveform in waveforms]
        for position, array in enumerate(arrays):
            if array.ndim != 1:
                raise ValueError(
                    f"waveform {position} has shape {array.shape}, expected mono audio [samples]; "
                    "take the mean of the channels first"
                )
            if len(array) > self._longest:
                raise ValueError(
                    f"waveform {position} has {len(array)} samples, but this student hears at most "
                    f"{self._longest} ({self.features.max_length} frames) at once; cut it into "
                    f"chunks of {self.features.chunk_samples}"
                )
            if not np.isfinite(array).all():
                raise ValueError(f"waveform {position} holds NaN or infinite samples")
        return arrays

    def _begin(self, arrays: Sequence[NDArray[np.float32]]) -> Result:
        """One batch, or halves of it where the whole does not fit the GPU's memory.

        Raises:
            torch.OutOfMemoryError: not even one chunk fits.
        """
        if len(arrays) <= self._fitting:
            try:
                return self._checking(self._batches.begin(arrays))
            except torch.OutOfMemoryError:
                if len(arrays) == 1:
                    raise
            # Outside the handler: its traceback would keep the failed batch's tensors alive.
            torch.cuda.empty_cache()
            self._halvings += 1
            self._fitting = min(self._fitting, len(arrays) // 2)
            logger.warning(
                "a batch of %d chunks does not fit the memory of %s; going on with %d",
                len(arrays), self.device, self._fitting,
            )  # fmt: skip
        half = len(arrays) // 2
        first, second = self._begin(arrays[:half]), self._begin(arrays[half:])

        def result() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            one, other = first(), second()
            return np.concatenate([one[0], other[0]]), np.concatenate([one[1], other[1]])

        return result

    def _checking(self, answer: Result) -> Result:
        def result() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            scores, pooled = answer()
            if not np.isfinite(scores).all():
                dtype = str(self.dtype).removeprefix("torch.")
                raise NonFiniteScoresError(
                    f"checkpoint {self.checkpoint.name!r} gives scores that are no numbers in {dtype} on "
                    f"{self.device}: its activations are too large for {dtype}, or its weights are damaged; "
                    "try --dtype float32, or bfloat16 on a GPU, and another output"
                )
            return scores, pooled

        return result


def choose_device(device: str) -> torch.device:
    """The device for a name; `auto` is CUDA where there is one, else the CPU.

    Raises:
        DeviceError: the name is unknown, or the device is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"device {device!r} is unknown; use auto, cpu, cuda or cuda:N") from error
    if place.type not in _MAX_BATCH_TOKENS:
        raise DeviceError(f"device {device!r} is not supported; use auto, cpu, cuda or cuda:N")
    if place.type == "cuda" and not torch.cuda.is_available():
        built = "is the CPU build" if torch.version.cuda is None else "finds no GPU or driver"
        raise DeviceError(
            f"device {device!r} was asked for, but torch {torch.__version__} {built}; "
            "install a CUDA build of torch on a machine with an NVIDIA GPU, or use --device cpu"
        )
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"device {device!r} was asked for, but there are {torch.cuda.device_count()}"
        )
    return place


def devices_of(device: str) -> list[str]:
    """The devices that a worker with `device` may use: `cuda` is every GPU of the machine.

    Raises:
        DeviceError: there is none.
    """
    place = choose_device(device)
    if place.type == "cuda" and place.index is None:
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [str(place)]


def choose_dtype(dtype: str, device: torch.device, hidden_size: int = 768) -> torch.dtype:
    """The dtype for a name.

    Args:
        dtype: `auto` is float32 on a CPU and the fastest within `TOLERANCE` on a GPU;
            `reduced` is the fastest within it on either.
        device: where it computes.
        hidden_size: how wide the student is.

    Raises:
        DeviceError: the name is unknown, or the device cannot compute in it.
    """
    on_cpu = device.type == "cpu"
    if dtype == "reduced" and on_cpu:
        # bfloat16 gains only where a processor has AMX, and there int8 gains twice that.
        return torch.int8 if has_int8() and hidden_size >= _INT8_LEAST_WIDTH else torch.float32
    if dtype in ("auto", "reduced"):
        if on_cpu:
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    if dtype not in DTYPES:
        raise DeviceError(f"dtype {dtype!r} is unknown; use auto, reduced, {', '.join(DTYPES)}")
    if dtype == "float16" and on_cpu:
        raise DeviceError("dtype 'float16' is for GPUs; use float32, bfloat16 or int8 on the CPU")
    if dtype == "int8" and not on_cpu:
        raise DeviceError("dtype 'int8' is for CPUs; use bfloat16 or float16 on a GPU")
    if dtype == "int8" and not has_int8():
        raise DeviceError(
            "dtype 'int8' was asked for, but this processor has no instructions for it (VNNI), or "
            "this torch no oneDNN; use float32"
        )
    return DTYPES[dtype]


def has_int8() -> bool:
    """Whether this processor multiplies 8-bit numbers faster than float32, and torch can say so."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    vnni = known.get("avx512_vnni", False) or known.get("avx_vnni", False)
    has_products = hasattr(torch.ops.onednn, "qlinear_prepack")
    return (
        bool(vnni) and has_products and choose_kernel(torch.device("cpu"), torch.int8) == "onednn"
    )


def made_sounds(features: FeatureSpec) -> NDArray[np.float32]:
    """Four made sounds [4, chunk_samples]: noise, a sweep, clicks, and a voice of sorts."""
    rate, samples = features.sample_rate, features.chunk_samples
    random, time_s = np.random.default_rng(0), np.arange(samples) / rate
    sweep = np.sin(2 * np.pi * (50 * time_s + (rate / 4 - 50) / features.chunk_s / 2 * time_s**2))
    clicks = np.zeros(samples)
    clicks[:: rate // 7] = 1
    harmonics = sum(np.sin(2 * np.pi * 140 * n * time_s) / n for n in range(1, 20))
    voice = harmonics * (1 + np.sin(2 * np.pi * 4 * time_s)) / 8
    sounds = np.stack([random.normal(0, 0.1, samples), 0.5 * sweep, clicks, 0.3 * voice])
    return sounds.astype(np.float32)


def settle_dtype(dtype: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """`choose_dtype`, and for int8 whether this checkpoint bears it, on made sounds.

    `reduced` falls to float32 where it does not. Takes a few seconds for int8.

    Raises:
        CheckpointError: the weights cannot be loaded.
        DeviceError: the device cannot compute in `dtype`, or not well enough.
    """
    precision = choose_dtype(dtype, device, checkpoint.hidden_size)
    if precision is not torch.int8:
        return precision
    # A run asks before it begins, and its worker again, in the same process where it is local.
    key = checkpoint.weights_sha256, checkpoint.config_sha256
    if key not in _int8_differences:
        _int8_differences[key] = _int8_difference(checkpoint)
    worst = _int8_differences[key]
    # Four sounds are few: what they differ by is doubled before it is judged.
    if 2 * worst <= TOLERANCE:
        return precision
    if dtype == "reduced":
        logger.info("int8 changes this student's scores by up to %.3f; float32 it is", worst)
        return torch.float32
    raise DeviceError(
        f"in int8 this student's scores differ from float32's by up to {worst:.3f} on four made "
        f"sounds, more than half of {TOLERANCE}; use float32 or bfloat16"
    )


def _int8_difference(checkpoint: Checkpoint) -> float:
    """How far int8's scores of the made sounds are from float32's, at most."""
    sounds, network = made_sounds(checkpoint.features), load_network(checkpoint)
    exact, coarse = (
        Student(network, checkpoint, torch.device("cpu"), dtype).score(sounds)
        for dtype in (torch.float32, torch.int8)
    )
    return float(np.abs(coarse - exact).max())


def load_network(checkpoint: Checkpoint) -> Network:
    """The weights of a checkpoint, float32 on the CPU, to score with.

    Raises:
        CheckpointError: they cannot be loaded, or some are missing.
    """
    return read_network(checkpoint) or network_of(load_model(checkpoint))


def load_model(checkpoint: Checkpoint) -> ASTForAudioClassification:
    """The weights of a checkpoint as transformers' model, float32 on the CPU, to train with.

    Raises:
        CheckpointError: they cannot be loaded, or some are missing.
    """
    # Here, because it takes seconds, and a usual checkpoint is scored without it.
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled
    from transformers import ASTForAudioClassification
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its progress bars and reports are for people
    bars = not are_progress_bars_disabled()
    if bars:
        transformers_logging.disable_progress_bar()
    try:
        model, report = ASTForAudioClassification.from_pretrained(
            checkpoint.directory,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers, safetensors and torch each raise their own kinds
        raise CheckpointError(
            f"the weights in {checkpoint.directory} cannot be loaded: {_first_line(error)}"
        ) from error
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
    absent = sorted(report["missing_keys"])
    if absent:
        raise CheckpointError(
            f"the weights in {checkpoint.directory} lack {len(absent)} of the model's tensors, "
            f"{absent[0]!r} first: the file is damaged or of another architecture"
        )
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
