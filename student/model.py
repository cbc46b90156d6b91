"""The student: waveforms in, scores out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, overload

import numpy as np
import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from numpy.typing import NDArray
from transformers import ASTForAudioClassification
from transformers.utils import logging as transformers_logging

from student import BUNDLED
from student.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from student.features import FRAME_SAMPLES, HOP_SAMPLES, FeatureSpec, LogMel
from student.labels import Label

logger = logging.getLogger(__name__)

Waveforms = NDArray[np.float32] | Sequence[NDArray[np.float32]]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# How many tokens (patches of a spectrogram) go through the model at once. A CPU
# gains nothing past its caches; a GPU wants to be full, and 64 chunks of a
# 1,214-token student with bf16 activations stay under 4 GB.
_MAX_BATCH_TOKENS = {"cpu": 4_096, "cuda": 77_696}


class DeviceError(RuntimeError):
    """The device that was asked for is not there; never replaced by another one."""


class Student:
    """An AST classifier on a device, with the features it was trained on.

    Attributes:
        checkpoint: where the weights came from, and the facts beside them.
        device: where the model runs.
        dtype: what it computes in; features and scores are float32 always.
        max_batch: chunks that go through the model at once.
    """

    def __init__(
        self,
        model: ASTForAudioClassification,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self._model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        if device.type == "cuda" and dtype is torch.float32:
            # float32 that was asked for is not to be TF32's 10 bits of mantissa.
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        self._log_mel = LogMel(checkpoint.features).to(device)
        tokens = model.audio_spectrogram_transformer.embeddings.position_embeddings.shape[1]
        self.max_batch = max(1, _MAX_BATCH_TOKENS[device.type] // tokens)
        self._halvings = 0
        self._fitting = self.max_batch  # less once a batch did not fit
        # Threads share a student. On a GPU they take turns, so that one batch's
        # activations are in its memory, not one for each thread.
        self._turn: AbstractContextManager[Any] = (
            threading.Lock() if device.type == "cuda" else nullcontext()
        )

    @classmethod
    def load(cls, checkpoint: str = BUNDLED, device: str = "auto", dtype: str = "auto") -> Student:
        """Loads a checkpoint onto a device.

        Args:
            checkpoint: `bundled`, a local directory, or a Hugging Face id such as
                `bookbot/distil-ast-audioset` (`owner/name@revision` pins one).
            device: `auto` (CUDA where there is one, else the CPU), `cpu`, `cuda` or
                `cuda:N`.
            dtype: `auto` (float32 on the CPU; bfloat16 on CUDA, float16 on cards
                older than Ampere), `float32`, `bfloat16` or `float16`.

        Raises:
            CheckpointError: the checkpoint is missing or unusable.
            DeviceError: the device is missing.
        """
        place = choose_device(device)
        precision = choose_dtype(dtype, place)
        facts = read_checkpoint(checkpoint)
        student = cls(load_model(facts), facts, place, precision)
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
    def embedding_size(self) -> int:
        """Length of an embedding: 768 for Distil-AST."""
        return int(self._model.config.hidden_size)

    def take_halvings(self) -> int:
        """How often a batch was cut in two for want of GPU memory, since the last call."""
        taken, self._halvings = self._halvings, 0
        return taken

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights as they are on the device."""
        return sum(p.numel() * p.element_size() for p in self._model.parameters())

    @property
    def parameters(self) -> int:
        """Number of weights: 44,066,831 for Distil-AST."""
        return sum(parameter.numel() for parameter in self._model.parameters())

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
                padded as AST pads, after the features.
            embeddings: whether to return embeddings too.

        Returns:
            Scores, float32 [n, labels]: the sigmoid of each logit, whatever
            `problem_type` the checkpoint states. With `embeddings` also float32
            [n, embedding_size]: the pooled vector after the final norm.

        Raises:
            ValueError: a waveform is not one-dimensional, is too long, or holds NaN
                or infinity.
        """
        arrays = [np.asarray(waveform, dtype=np.float32) for waveform in waveforms]
        for position, array in enumerate(arrays):
            self._check(position, array)
        scores = np.empty((len(arrays), len(self.labels)), np.float32)
        pooled = np.empty((len(arrays), self.embedding_size), np.float32)
        for start in range(0, len(arrays), self.max_batch):
            batch = slice(start, start + self.max_batch)
            scores[batch], pooled[batch] = self._score_fitting(arrays[batch])
        return (scores, pooled) if embeddings else scores

    def _check(self, position: int, array: NDArray[np.float32]) -> None:
        if array.ndim != 1:
            raise ValueError(
                f"waveform {position} has shape {array.shape}, expected mono audio [samples]; "
                "take the mean of the channels first"
            )
        limit = (self.features.max_length - 1) * HOP_SAMPLES + FRAME_SAMPLES
        if len(array) > limit:
            raise ValueError(
                f"waveform {position} has {len(array)} samples, but this student hears at most {limit} "
                f"({self.features.max_length} frames) at once; cut it into chunks of "
                f"{self.features.chunk_samples}"
            )
        if not np.isfinite(array).all():
            raise ValueError(f"waveform {position} holds NaN or infinite samples")

    def _score_fitting(
        self, arrays: Sequence[NDArray[np.float32]]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """`_score_batch`, in halves where the whole does not fit the GPU's memory.

        Raises:
            torch.OutOfMemoryError: not even one chunk fits.
        """
        if len(arrays) <= self._fitting:
            try:
                with self._turn:
                    return self._score_batch(arrays)
            except torch.OutOfMemoryError:
                if len(arrays) == 1:
                    raise
            # Outside the handler: its traceback would keep the failed batch's tensors alive.
            torch.cuda.empty_cache()
            self._halvings += 1
            self._fitting = len(arrays) // 2
            logger.warning(
                "a batch of %d chunks does not fit the memory of %s; going on with %d",
                len(arrays), self.device, self._fitting,
            )  # fmt: skip
        half = len(arrays) // 2
        first, second = self._score_fitting(arrays[:half]), self._score_fitting(arrays[half:])
        return np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]])

    @torch.inference_mode()
    def _score_batch(
        self, arrays: Sequence[NDArray[np.float32]]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        lengths = torch.tensor([len(array) for array in arrays])
        waveforms = torch.zeros((len(arrays), int(lengths.max())))
        for row, array in enumerate(arrays):
            waveforms[row, : len(array)] = torch.from_numpy(array)
        features = self._log_mel(waveforms.to(self.device), lengths.to(self.device))
        pooled = self._model.audio_spectrogram_transformer(features.to(self.dtype)).pooler_output
        logits = self._model.classifier(pooled)
        return logits.float().sigmoid().cpu().numpy(), pooled.float().cpu().numpy()


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


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype for a name; `auto` is the fastest that keeps scores within 0.01.

    Raises:
        DeviceError: the name is unknown, or the device cannot compute in it.
    """
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    if dtype not in DTYPES:
        raise DeviceError(f"dtype {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
    if dtype == "float16" and device.type == "cpu":
        raise DeviceError("dtype 'float16' is for GPUs; use float32 or bfloat16 on the CPU")
    return DTYPES[dtype]


def load_model(checkpoint: Checkpoint) -> ASTForAudioClassification:
    """The weights of a checkpoint in its architecture, float32 on the CPU.

    Raises:
        CheckpointError: they cannot be loaded, or some are missing.
    """
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
