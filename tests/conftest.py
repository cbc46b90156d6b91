"""What several test files share: reference data, a tiny student, encoded audio, tars."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from google.auth.compute_engine import _metadata
from numpy.typing import NDArray
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

from pipeline.cli import cli
from student.labels import audioset_labels
from student.model import Student
from transforms import storage

REPO = Path(__file__).resolve().parents[1]

# Two threads on arrays as small as the tests' wait for each other, all the longer on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the repository."""
    folder = REPO.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the reference data (a folder `shared` beside the repository) is absent")
    return folder


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Path]:
    """Saves a small random AST with `names` as labels: 1.28 s chunks, 18 tokens, hidden 32.

    The weights are far larger than a training would begin with, so that scores
    spread over (0, 1) and depend on the audio.
    """

    def make(folder: Path, names: Iterable[str], **config: object) -> Path:
        torch.manual_seed(20)
        model = ASTForAudioClassification(
            ASTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                num_mel_bins=32,
                max_length=128,
                patch_size=16,
                frequency_stride=16,
                time_stride=16,
                initializer_range=0.5,
                id2label=dict(enumerate(names)),
                **config,
            )
        )
        model.save_pretrained(folder)
        ASTFeatureExtractor(num_mel_bins=32, max_length=128).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]
) -> Path:
    """A checkpoint of AudioSet's 527 labels that loads and runs in no time. Do not change it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return make_checkpoint(folder, [label.name for label in audioset_labels()])


@pytest.fixture(scope="session")
def tiny_student(tiny_checkpoint: Path) -> Student:
    """The student of `tiny_checkpoint`, on the CPU."""
    return Student.load(str(tiny_checkpoint), device="cpu")


@pytest.fixture(scope="session")
def noise() -> Callable[..., NDArray[np.float32]]:
    """Repeatable noise: `noise(samples)` is [samples], `noise((samples, channels))` too."""

    def make(shape: int | tuple[int, int], seed: int = 0) -> NDArray[np.float32]:
        return (0.1 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)

    return make


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    """Encodes [samples] or [samples, channels] as `wav`, `flac`, `ogg` (Vorbis) or `mp3`."""

    def encode(
        waveform: NDArray[np.floating],
        sample_rate: int = 16_000,
        format: str = "wav",
        subtype: str | None = None,
    ) -> bytes:
        file = io.BytesIO()
        soundfile.write(file, waveform, sample_rate, format=format.upper(), subtype=subtype)
        return file.getvalue()

    return encode


@pytest.fixture(scope="session")
def make_tar() -> Callable[..., Path]:
    """Writes a WebDataset tar of (name, content) members, in that order."""

    def make(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
        with tarfile.open(path, mode, errors="surrogateescape") as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    return make


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the repository holds, as a checkout elsewhere would."""
    copy = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPO, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (REPO / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((REPO / name).read_bytes())
    return copy


@pytest.fixture
def lead_to(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Mapping[str, str]], None]]:
    """Leads this process's clients of the cloud to a stand-in, by its `env`."""

    def lead(env: Mapping[str, str]) -> None:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        if "GCE_METADATA_HOST" in env:  # which google-auth read when it was imported, once
            monkeypatch.setattr(_metadata, "_GCE_METADATA_HOST", env["GCE_METADATA_HOST"])
        storage.forget_clients()

    yield lead
    storage.forget_clients()


@pytest.fixture
def earmark(
    tiny_checkpoint: Path, lead_to: Callable[[Mapping[str, str]], None]
) -> Callable[..., str]:
    """Runs `earmark` in this process with `env`, and gives what it prints."""

    def run(env: Mapping[str, str], *arguments: object, code: int = 0) -> str:
        lead_to(env)
        command = [str(argument) for argument in arguments]
        if command[0] == "annotate" and "--checkpoint" not in command:
            command += ["--checkpoint", str(tiny_checkpoint)]
        done = CliRunner().invoke(cli, command)
        assert done.exit_code == code, done.output
        assert "Traceback" not in done.output
        return done.output

    return run
