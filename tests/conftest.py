"""What several test files share: reference data, a tiny student, encoded audio, tars."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import tarfile
import time
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


class Chromium:
    """A headless browser, driven by DevTools' own protocol over a pipe; one page at a time."""

    def __init__(self, program: str, profile: Path) -> None:
        commands, ours = os.pipe()
        answers, theirs = os.pipe()
        arguments = [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--mute-audio",
            "--remote-debugging-pipe", "--autoplay-policy=no-user-gesture-required",
            f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{theirs}', "chromium", *arguments],
            pass_fds=(commands, theirs), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(theirs)
        self._write, self._read = os.fdopen(ours, "wb"), os.fdopen(answers, "rb")
        self._number, self._session, self._rest = 0, None, b""
        self.said: list[dict] = []  # events since `open`

    def _next(self) -> dict:
        while b"\0" not in self._rest:
            block = os.read(self._read.fileno(), 1 << 16)
            if not block:
                raise RuntimeError("the browser is gone")
            self._rest += block
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **parameters: object) -> dict:
        """One command of the protocol, and its answer."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        self._write.write(json.dumps(command).encode() + b"\0")
        self._write.flush()
        while True:
            message = self._next()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self.said.append(message)

    def open(self, file: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Opens a file, and waits until its script is done."""
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self.said.clear()
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self.call("Page.navigate", url=file.absolute().as_uri())
        self.until("document.documentElement?.dataset.ready === 'yes'")

    def run(self, script: str) -> object:
        """The value of an expression in the page; a promise is waited for."""
        done = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def until(self, script: str, limit_s: float = 60) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + limit_s
        while not self.run(script):
            assert time.monotonic() < end, f"not true within {limit_s} s: {script}; {self.said}"
            time.sleep(0.05)

    def screenshot(self, file: Path, whole: bool = False) -> None:
        """Writes a PNG of what is seen, or of the whole page."""
        done = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(done["data"]))

    def close(self) -> None:
        """Ends the browser."""
        self._process.terminate()
        self._process.wait(30)
        self._write.close()
        self._read.close()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """A browser of this machine."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium is installed")
    browser = Chromium(program, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()
