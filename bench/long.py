"""A recording of hours as one stream: peak memory above the idle process, and the same scores as at once.

    python bench/long.py [--codecs flac mp3 m4a] [--hours 4] [--work FOLDER]

Makes a recording of 44.1 kHz stereo with PyAV, a minute of changing tones and noise repeated, and scores it in
a process of its own with the bundled student: decoded, resampled, cut and scored as `annotate` does it.
Peak resident memory is compared with that of the process once its model has scored a first batch. The
scores are compared with those of the same audio decoded whole (ffmpeg, and soxr over the whole), cut and scored.

Prints JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soxr
from numpy.typing import NDArray

if __name__ == "__main__":  # this folder is first in the path, the checkout is not in it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

RATE = 44_100
CODECS = {"flac": ("flac", "flac"), "mp3": ("mp3", "libmp3lame"), "m4a": ("ipod", "aac")}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument("--hours", type=float, default=4.0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--score", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.score:
        print(json.dumps(scored(args.score, args.whole)))
        return
    results = {}
    for codec in args.codecs:
        file = args.work / f"long.{codec}"
        try:
            make(file, codec, args.hours)
            stream, whole = (in_a_process(file, *flags) for flags in ([], ["--whole"]))
        finally:
            file.unlink(missing_ok=True)
        difference = np.abs(np.array(stream.pop("scores")) - np.array(whole.pop("scores"))).max()
        results[codec] = stream | {"whole": whole, "largest_difference": float(difference)}
        print(json.dumps({codec: results[codec]}), file=sys.stderr)
    print(json.dumps({"hours": args.hours, "codecs": results}, indent=2))


def in_a_process(file: Path, *flags: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--score", str(file), *flags]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=-1).stdout)
    return result


def make(file: Path, codec: str, hours: float) -> None:
    """Writes a recording."""
    format, encoder = CODECS[codec]
    minute = sound()
    with av.open(str(file), "w", format=format) as container:
        stream = container.add_stream(encoder, rate=RATE, layout="stereo")
        size = stream.codec_context.frame_size or 4_608
        resampler = av.AudioResampler(stream.format, "stereo", RATE, frame_size=size)
        for number in range(max(1, round(60 * hours))):
            frame = av.AudioFrame.from_ndarray(minute, "fltp", "stereo")
            frame.sample_rate, frame.time_base = RATE, Fraction(1, RATE)
            frame.pts = number * minute.shape[1]
            for piece in resampler.resample(frame):
                container.mux(stream.encode(piece))
        for piece in [*resampler.resample(None), None]:
            container.mux(stream.encode(piece))


def sound() -> NDArray[np.float32]:
    """float32 [2, a minute]."""
    random = np.random.default_rng(0)
    time_s = np.arange(60 * RATE) / RATE
    tone = 0.2 * np.sin(2 * np.pi * 440 * time_s * (1 + time_s / 60))
    noise = random.normal(0, 0.02, (2, len(time_s))) * (1 + np.sin(time_s))
    return (tone + noise).astype(np.float32)


def mixed(frame: av.AudioFrame) -> NDArray[np.float32]:
    """float32 [samples], the mean of the two channels."""
    values = frame.to_ndarray()
    if len(values) == 1:  # interleaved
        values = values.reshape(-1, 2).T
    if values.dtype != np.float32:
        values = values.astype(np.float32) / np.float32(-float(np.iinfo(values.dtype).min))
    mean: NDArray[np.float32] = values.mean(axis=0)
    return mean


def peak_mb() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1_024


def scored(file: Path, whole: bool) -> dict[str, Any]:
    """Scores of a recording, and what it took."""
    from student import BUNDLED
    from student.model import Student
    from transforms.checkpoint import local_checkpoint
    from transforms.chunk import cut_chunks
    from transforms.decode import RESAMPLE_QUALITY
    from transforms.decode_clip import decode_clip
    from transforms.readahead import read_ahead
    from transforms.records import ClipEnd, EncodedClip
    from transforms.score import score_clips
    from transforms.storage import DEFAULT_ACCESS

    student = Student.load(local_checkpoint(BUNDLED, DEFAULT_ACCESS), "cpu", "float32")
    features = student.features
    silence = np.zeros(features.chunk_samples, np.float32)
    student.score([silence] * student.max_batch)
    idle_mb, started = peak_mb(), time.perf_counter()
    if whole:
        content = file.read_bytes()
        with av.open(io.BytesIO(content)) as container:
            audio = np.concatenate([mixed(frame) for frame in container.decode(audio=0)])
        mono = soxr.resample(audio, RATE, features.sample_rate, RESAMPLE_QUALITY)
        chunks = cut_chunks([mono.astype(np.float32)], features.chunk_samples, features.sample_rate)
        end = ClipEnd("a", 0, None, {}, duration_s=len(audio) / RATE)
        (clip,) = score_clips(iter([*chunks, end]), student)
    else:
        with file.open("rb") as audio_file:
            encoded = EncodedClip("a", audio_file, file.stat().st_size, "", {})
            decoded = read_ahead(decode_clip(encoded, features), 2 * student.max_batch)
            (clip,) = score_clips(decoded, student)
        assert clip.clip.error is None, clip.clip.error
    assert clip.scores is not None
    return {
        "duration_s": clip.clip.duration_s,
        "idle_mb": round(idle_mb, 1),
        "above_idle_mb": round(peak_mb() - idle_mb, 1),
        "wall_s": round(time.perf_counter() - started, 1),
        "scores": clip.scores.tolist(),
    }


if __name__ == "__main__":
    main()
