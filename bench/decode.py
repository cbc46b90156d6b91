"""How many clips a second decode, by codec and sample rate: plain, in threads, in processes.

    python bench/decode.py [--record]

Each clip is 10 s of decaying tones over a little noise, mono or stereo, encoded once. Every way
decodes the same clips, from encoded bytes in memory to chunks at 16 kHz, in turn, several rounds;
the figures are medians:

- plain: `decode_clips` in one thread, also in CPU time, which other work on the machine disturbs
  less;
- threads: so many, each with its own `decode_clips`, under one GIL;
- pool: `DecodePool` of so many processes, its owner copying every chunk out.

Prints the machine and JSON; with `--record` a table of it is appended to `RESULTS.md`.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile

if __name__ == "__main__":  # this folder is first in the path, the checkout is not in it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.record import append_results, machine, table
from student.feature_spec import FeatureSpec
from transforms.decode_clip import decode_clips
from transforms.decode_pool import DecodePool
from transforms.records import ClipEnd, EncodedClip

CLIP_S = 10.0
FEATURES = FeatureSpec()
WORKERS = (1, 2)
RATES = (16_000, 22_050, 44_100, 48_000)
OPUS_RATES = (16_000, 48_000)  # those of RATES that it has; it decodes at 48 kHz from either

# format -> (container, encoder of ffmpeg's, bits a second of mono), or libsndfile's (format,).
FORMATS: dict[str, tuple[Any, ...]] = {
    "wav": ("WAV",),
    "flac": ("FLAC",),
    "mp3": ("mp3", "libmp3lame", 64_000),
    "vorbis": ("OGG",),
    "opus": ("ogg", "libopus", 48_000),
    "m4a": ("mp4", "aac", 64_000),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=30, help="of each kind, a round and way")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--record", action="store_true", help="append a table to RESULTS.md")
    args = parser.parse_args(argv)

    about = machine()
    rows = []
    pools = {workers: DecodePool(FEATURES, workers) for workers in WORKERS}
    try:
        for format in args.formats:
            for rate in OPUS_RATES if format == "opus" else RATES:
                for channels in (1, 2):
                    content = encode(format, rate, channels)
                    kind = {"format": format, "rate_hz": rate, "channels": channels}
                    rows.append(kind | measure(content, args.clips, args.rounds, pools))
                    print(json.dumps(rows[-1]), file=sys.stderr)
        result = {
            "machine": about,
            "av": av.__version__,
            "clips": args.clips,
            "rounds": args.rounds,
            "process": of_a_process(encode("wav", 16_000, 1), pools[1]),
            "rows": rows,
        }
    finally:
        for pool in pools.values():
            pool.close()
    print(json.dumps(result, indent=2))
    if args.record:
        append_results("decoding", result["machine"], lines(result))


def measure(
    content: bytes, clips: int, rounds: int, pools: dict[int, DecodePool]
) -> dict[str, Any]:
    """Clips a second of every way, and CPU milliseconds a clip of the plain one and the owner."""
    ways: dict[str, Callable[[], None]] = {"plain": lambda: in_threads(content, clips, 0)}
    for workers in WORKERS:
        ways[f"threads_{workers}"] = lambda n=workers: in_threads(content, clips, n)
        ways[f"pool_{workers}"] = lambda n=workers: check(
            pools[n].decode(copies(content, clips)), clips
        )
    wall_s: dict[str, list[float]] = {way: [] for way in ways}
    cpu_s: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, work in ways.items():
            started, cpu = time.perf_counter(), time.process_time()
            work()
            if number:  # the first round warms up
                wall_s[way].append(time.perf_counter() - started)
                cpu_s[way].append(time.process_time() - cpu)
    return {
        "bytes": len(content),
        "clips_per_s": {
            way: round(clips / statistics.median(values), 1) for way, values in wall_s.items()
        },
        "cpu_ms_a_clip": round(1_000 * statistics.median(cpu_s["plain"]) / clips, 2),
        "owner_cpu_ms_a_clip": round(1_000 * statistics.median(cpu_s["pool_2"]) / clips, 2),
    }


def in_threads(content: bytes, clips: int, threads: int) -> None:
    """Decodes `clips` clips in `threads` threads, or in this one."""
    if not threads:
        check(decode_clips(copies(content, clips), FEATURES), clips)
        return
    shares = [clips // threads + (number < clips % threads) for number in range(threads)]
    with ThreadPoolExecutor(threads) as executor:
        done = [
            executor.submit(lambda n: check(decode_clips(copies(content, n), FEATURES), n), share)
            for share in shares
        ]
        for one in done:
            one.result()


def copies(content: bytes, clips: int) -> Iterator[EncodedClip]:
    for number in range(clips):
        yield EncodedClip(f"{number}", io.BytesIO(content), len(content), "", {})


def check(events: Iterable[Any], clips: int) -> None:
    """Takes all, and makes sure that every clip was decoded whole."""
    ends = [event for event in events if isinstance(event, ClipEnd)]
    assert len(ends) == clips
    for end in ends:
        assert end.error is None and abs((end.duration_s or 0) - CLIP_S) < 0.2, (
            end
        )  # AAC and its padding


def of_a_process(content: bytes, pool: DecodePool) -> dict[str, Any]:
    """Start to first clip of one more process, and what one holds after its work (Linux)."""
    started = time.perf_counter()
    with DecodePool(FEATURES, 1) as another:
        check(another.decode(copies(content, 1)), 1)
        first_clip_s = time.perf_counter() - started
    status = Path(f"/proc/{pool.process_ids[0]}/status")
    memory = {}
    if status.exists():
        lines = (line.split() for line in status.read_text().splitlines())
        held = {words[0].rstrip(":"): int(words[1]) for words in lines if words[-1:] == ["kB"]}
        names = {"VmHWM": "peak_mb", "VmRSS": "resident_mb", "RssAnon": "its_own_mb"}
        memory = {name: round(held[key] / 1_024, 1) for key, name in names.items()}
    return {"first_clip_s": round(first_clip_s, 2)} | memory


# ------------------------------------------------------------------------- clips


def encode(format: str, rate: int, channels: int) -> bytes:
    """A clip in one of FORMATS."""
    container, *encoder = FORMATS[format]
    waveform = sound(rate, channels)
    file = io.BytesIO()
    if not encoder:
        soundfile.write(file, waveform, rate, format=container)
        return file.getvalue()
    name, bit_rate = encoder
    layout = "mono" if channels == 1 else "stereo"
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(name, rate=rate, layout=layout)
        stream.bit_rate = bit_rate * channels
        samples = np.ascontiguousarray(waveform.T)
        frame = av.AudioFrame.from_ndarray(samples, "fltp", layout)
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.format, layout, rate)
        for piece in [*resampler.resample(frame), None]:
            output.mux(stream.encode(piece))
    return file.getvalue()


def sound(rate: int, channels: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 [samples, channels]: a note with overtones every quarter of a second, over noise.

    Noise alone would be the worst case of every codec, and a steady tone the best.
    """
    random = np.random.default_rng(0)
    time_s = np.arange(int(CLIP_S * rate)) / rate
    waveform = random.normal(0, 0.01, (len(time_s), channels))
    for start_s in np.arange(0, CLIP_S, 0.25):
        sounding = time_s >= start_s
        since_s = time_s[sounding] - start_s
        for overtone in range(1, 8):
            hertz = overtone * 110 * 2 ** (random.integers(0, 25) / 12)
            if hertz < rate / 2:
                tone = np.sin(2 * np.pi * hertz * since_s) * np.exp(-6 * since_s)
                waveform[sounding] += (
                    0.1 / overtone * tone[:, None] * random.uniform(0.5, 1, channels)
                )
    return (waveform / np.abs(waveform).max() * 0.8).astype(np.float32)


# ----------------------------------------------------------------------- figures


def lines(result: dict[str, Any]) -> list[str]:
    """The result as Markdown for RESULTS.md."""
    process, rows = result["process"], result["rows"]
    ways = list(rows[0]["clips_per_s"])
    memory = ", ".join(
        f"{name.replace('_mb', '')} {mb} MB" for name, mb in process.items() if "mb" in name
    )
    told = (
        f"`decode.py --clips {result['clips']} --rounds {result['rounds']}`: clips of {CLIP_S:g} s a second, to "
        f"chunks at 16 kHz, PyAV {result['av']}. A process of the pool gave its first clip after "
        f"{process['first_clip_s']} s; memory after its work: {memory or 'not known here'}."
    )
    head = ["format", "Hz", "channels", "bytes", "CPU ms a clip"]
    head += [way.replace("_", " ") for way in ways] + ["owner's CPU ms a clip, pool 2"]
    cells = [
        [
            row["format"],
            f"{row['rate_hz']:,}",
            row["channels"],
            f"{row['bytes']:,}",
            row["cpu_ms_a_clip"],
            *row["clips_per_s"].values(),
            row["owner_cpu_ms_a_clip"],
        ]
        for row in rows
    ]
    return [told, "", *table(head, cells)]


if __name__ == "__main__":
    main()
