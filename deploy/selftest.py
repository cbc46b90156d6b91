"""Says whether an installation of earmark can do its work: versions, codecs, a student, a GPU.

    python selftest.py --python 3.11 --beam 2.77.0 --checkpoint bookbot/distil-ast-audioset

One line a check. The image runs it when it is built; `--gpu` is for a machine that has one. The
exit code is 1 after the first check that fails, with a sentence that says what is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import io
import platform
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

SAMPLE_RATE = 16_000
FORMATS = ("wav", "flac", "mp3", "ogg")
SECONDS = 2.0
_PACKAGES = ("student", "transforms", "training", "pipeline")


class Broken(Exception):
    """A check failed; the message says what is wrong and what to do."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the checks in order; stops at the first that fails."""
    parser = argparse.ArgumentParser(description="Check an installation of earmark.")
    parser.add_argument("--python", metavar="VERSION", help="the Python that is expected, as 3.11")
    parser.add_argument("--beam", metavar="VERSION", help="the Beam that is expected, as 2.77.0")
    parser.add_argument("--checkpoint", default="bundled", metavar="C", help="default: %(default)s")
    parser.add_argument(
        "--labels", type=int, default=527, metavar="N", help="its labels; default: %(default)s"
    )
    parser.add_argument("--gpu", action="store_true", help="require a CUDA device, and use it")
    asked = parser.parse_args(arguments)
    try:
        print(f"python {check_python(asked.python)}")
        print(f"beam {check_beam(asked.beam)}")
        print(f"earmark {check_packages()}")
        print(f"codecs {', '.join(check_codecs())}")
        print(f"device {check_device(asked.gpu)}")
        print(f"student {check_student(asked.checkpoint, asked.labels, asked.gpu)}")
    except Broken as fault:
        print(f"selftest failed: {fault}", file=sys.stderr)
        sys.exit(1)


def check_python(expected: str | None) -> str:
    """The Python that runs, which is the `expected` one."""
    found = platform.python_version()
    if expected is not None and not f"{found}.".startswith(f"{expected}."):
        raise Broken(
            f"this is Python {found}, but {expected} is expected: launcher and image must agree"
        )
    return found


def check_beam(expected: str | None) -> str:
    """The Beam that is installed, which is the `expected` one and can reach Google Cloud."""
    found = _version("apache-beam")
    if expected is not None and found != expected:
        raise Broken(
            f"this is Beam {found}, but {expected} is expected: launcher and image must agree"
        )
    from apache_beam.io.gcp import gcsio  # noqa: F401  fails without the extra `gcp`
    from google.protobuf.internal import api_implementation

    kind = api_implementation.Type()
    if kind != "upb":
        raise Broken(f"protobuf runs in {kind}, expected upb (compiled): reinstall protobuf")
    return found


def check_packages() -> str:
    """The installed earmark; its packages come from there, not from where this was started."""
    installed = _version("earmark-audio")
    places = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    for name in _PACKAGES:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise Broken(f"the package {name!r} cannot be imported: {error}") from error
        file = Path(module.__file__ or "").resolve()
        if not places & set(file.parents):
            raise Broken(
                f"the package {name!r} comes from {file.parent}, not from the installation in "
                f"{min(places)}: another distribution or a checkout shadows it"
            )
    stated = importlib.import_module("pipeline").__version__
    if stated != installed:
        raise Broken(
            f"earmark-audio {installed} is installed, but pipeline says that it is {stated}"
        )
    return installed


def check_codecs() -> list[str]:
    """The formats that were written, read back, and found as long and as loud as they should be."""
    import numpy as np
    import soundfile

    from transforms.decode import AudioDecoder
    from transforms.records import ClipError

    tone = _tone()
    for kind in FORMATS:
        file = io.BytesIO()
        soundfile.write(file, tone, SAMPLE_RATE, format=kind.upper())
        file.seek(0)
        try:
            decoded = np.concatenate(list(AudioDecoder(file).mono(SAMPLE_RATE)))
        except ClipError as error:
            raise Broken(f"{kind} cannot be decoded: {error.type}: {error}") from error
        # Lossy codecs pad at both ends; a tenth of a second is more than any of them does.
        if abs(len(decoded) - len(tone)) > 0.1 * SAMPLE_RATE:
            raise Broken(f"{kind}: {len(decoded)} samples came back of {len(tone)}")
        loudness, expected = (float(np.sqrt(np.mean(x**2))) for x in (decoded, tone))
        if abs(loudness / expected - 1) > 0.1:
            raise Broken(f"{kind}: its loudness is {loudness:.3f}, expected {expected:.3f}")
    return list(FORMATS)


def check_device(gpu: bool) -> str:
    """What torch computes on; with `gpu`, a CUDA device that answers."""
    import torch

    cuda = f"torch {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"
    if not torch.cuda.is_available():
        if gpu and torch.version.cuda is None:
            raise Broken(f"{cuda}: this torch is the CPU build; install the one with CUDA")
        if gpu:
            raise Broken(
                f"no CUDA device ({cuda}): is a GPU attached, its driver mounted, and as new as this CUDA "
                "asks (CUDA 13 wants driver 580 or later; nvidia-smi names yours)?"
            )
        return f"cpu ({cuda})"
    product = torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")
    if float(product.sum()) != 64**3:
        raise Broken(f"the GPU multiplies wrongly: {float(product.sum())}, expected {64**3}")
    return f"{torch.cuda.get_device_name(0)} ({cuda})"


def check_student(checkpoint: str, labels: int, gpu: bool) -> str:
    """The checkpoint that loads and scores a tone."""
    import numpy as np

    from student import CheckpointError, Student

    try:
        student = Student.load(checkpoint, "cuda" if gpu else "cpu")
    except CheckpointError as error:
        raise Broken(f"the student does not load: {error}") from error
    if student.features.sample_rate != SAMPLE_RATE:
        raise Broken(
            f"{checkpoint} hears {student.features.sample_rate} Hz, expected {SAMPLE_RATE}"
        )
    scores = student.score([_tone()[: student.features.chunk_samples]])
    if scores.shape != (1, labels):
        raise Broken(f"{checkpoint} gives scores of shape {scores.shape}, expected (1, {labels})")
    if not (np.isfinite(scores).all() and scores.min() >= 0 and scores.max() <= 1):
        raise Broken(f"{checkpoint} gives scores that are not within 0 and 1")
    best = student.labels[int(scores[0].argmax())].name
    return f"{checkpoint}, {labels} scores, highest {best!r} {scores.max():.2f}"


def _tone():  # type: ignore[no-untyped-def]
    import numpy as np

    seconds = np.arange(round(SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    return (0.5 * np.sin(2 * np.pi * 440 * seconds)).astype(np.float32)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise Broken(f"{distribution} is not installed here") from error


if __name__ == "__main__":
    main()
