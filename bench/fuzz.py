"""Damaged files by the thousand through `decode_clip`: what crashes, hangs, raises, or gives no row.

    python bench/fuzz.py [--mutants 20000] [--seed 0] [--zoo FOLDER]

A mutant is a file of the zoo with flipped bits, with numbers of its header set to extremes, cut, with
a hole, with noise put in, or spliced with another file. It depends on the seed and its number alone,
so that `--only N` makes one again, and `--save FILE` keeps it. Workers are processes of their own: one
that ends is counted as a crash and replaced, one that is silent for `--hang-s` as a hang.

Prints JSON; exit code 1 where anything went wrong.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import select
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":  # this folder is first in the path, the checkout is not in it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from student.feature_spec import FeatureSpec
from transforms.decode import Limits
from transforms.decode_clip import decode_clip
from transforms.records import Chunk, ClipEnd, EncodedClip

ZOO = Path(__file__).resolve().parents[2] / "shared" / "audio-zoo"
MOST_BYTES = 400_000  # of a file: longer ones take longer, and break no other way
LIMITS = Limits(duration_s=120.0, clip_timeout_s=20.0)
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)


def zoo_files(zoo: Path) -> list[bytes]:
    """The contents of a zoo's files, in the order of their names, without what is in `MOST_BYTES`."""
    files = sorted(path for path in zoo.rglob("*") if path.is_file() and path.parent != zoo)
    return [path.read_bytes()[:MOST_BYTES] for path in files]


def mutant(files: list[bytes], seed: int, number: int) -> bytes:
    """One damaged file, by its number."""
    random = np.random.default_rng([seed, number])
    content = bytearray(files[random.integers(len(files))])
    for _ in range(random.integers(1, 4)):
        size = len(content)
        at = int(random.integers(max(1, size)))
        if random.random() < 0.5:
            at = min(at, int(random.integers(512)))  # headers are where it hurts
        match random.integers(6):
            case 0:  # bits
                for place in random.integers(at, max(at + 1, size), random.integers(1, 64)):
                    if place < size:
                        content[place] ^= 1 << int(random.integers(8))
            case 1:  # a number
                value = int(random.choice(_EXTREMES)).to_bytes(4, random.choice(["big", "little"]))
                width = int(random.choice([1, 2, 4]))
                content[at : at + width] = value[-width:]
            case 2:
                del content[at:]
            case 3:  # a hole
                del content[at : at + int(random.integers(1, 5_000))]
            case 4:  # noise
                content[at:at] = random.bytes(int(random.integers(1, 5_000)))
            case 5:
                other = files[random.integers(len(files))]
                content[at:] = other[int(random.integers(len(other) + 1)) :]
    return bytes(content)


def row_of(content: bytes) -> str:
    """What a file comes to: "ok", or the type of its error.

    Raises:
        AssertionError: it does not come to one row with numbers that can be.
    """
    events = list(
        decode_clip(
            EncodedClip("", io.BytesIO(content), len(content), "", {}), FeatureSpec(), LIMITS
        )
    )
    *chunks, end = events
    assert isinstance(end, ClipEnd) and all(isinstance(chunk, Chunk) for chunk in chunks)
    assert all(np.isfinite(chunk.waveform).all() for chunk in chunks)
    counts = end.error is None or end.error.partial
    if counts:
        assert chunks and end.duration_s and 0 < end.duration_s <= LIMITS.duration_s + 1e-6
        assert abs(chunks[-1].end_s - end.duration_s) < 0.002, (chunks[-1].end_s, end)
    return "ok" if end.error is None else end.error.type


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zoo", type=Path, default=ZOO)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--hang-s", type=float, default=60.0)
    parser.add_argument("--only", type=int, help="decode this one here")
    parser.add_argument("--save", type=Path, help="with --only: write it to a file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve(args.zoo, args.seed)
    elif args.only is not None:
        content = mutant(zoo_files(args.zoo), args.seed, args.only)
        if args.save:
            args.save.write_bytes(content)
        print(row_of(content))
    else:
        result = fuzz(args.zoo, args.seed, args.mutants, args.workers, args.hang_s)
        print(json.dumps(result, indent=2))
        sys.exit(1 if result["crashes"] or result["hangs"] or result["raised"] else 0)


def fuzz(zoo: Path, seed: int, mutants: int, workers: int, hang_s: float) -> dict[str, Any]:
    """Decodes all mutants in workers; counts what they come to."""
    numbers = iter(range(mutants))
    lock = threading.Lock()
    rows: Counter[str] = Counter()
    wrong: dict[str, list[Any]] = {"crashes": [], "hangs": [], "raised": []}
    timed_out: list[int] = []
    most_mb = 0.0
    slowest: tuple[float, int] = (0.0, -1)

    def work() -> None:
        nonlocal most_mb, slowest
        worker: subprocess.Popen[str] | None = None
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                break
            if worker is None:
                command = [
                    sys.executable,
                    __file__,
                    "--serve",
                    "--seed",
                    str(seed),
                    "--zoo",
                    str(zoo),
                ]
                worker = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            assert worker.stdin is not None and worker.stdout is not None
            started = time.monotonic()
            worker.stdin.write(f"{number}\n")
            worker.stdin.flush()
            if not select.select([worker.stdout], [], [], hang_s)[0]:
                worker.kill()
                worker.wait()
                worker = None
                with lock:
                    wrong["hangs"].append(number)
                continue
            line = worker.stdout.readline()
            if not line:
                with lock:
                    wrong["crashes"].append([number, worker.wait()])
                worker = None
                continue
            said = json.loads(line)
            with lock:
                if "raised" in said:
                    wrong["raised"].append([number, said["raised"]])
                else:
                    rows[said["row"]] += 1
                    if said["row"] == "TimedOut":
                        timed_out.append(number)
                most_mb = max(most_mb, said["mb"])
                slowest = max(slowest, (round(time.monotonic() - started, 2), number))
        if worker is not None and worker.stdin is not None:
            worker.stdin.close()
            worker.wait()

    started = time.monotonic()
    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "mutants": mutants,
        "seed": seed,
        "rows": sum(rows.values()),
        **wrong,
        "peak_resident_mb": most_mb,
        "timed_out": timed_out,
        "slowest": {"s": slowest[0], "mutant": slowest[1]},
        "wall_s": round(time.monotonic() - started, 1),
        "outcomes": dict(rows.most_common()),
    }


def serve(zoo: Path, seed: int) -> None:
    """Decodes the mutants whose numbers come, one a line; says what each came to."""
    files = zoo_files(zoo)
    for line in sys.stdin:
        try:
            said: dict[str, Any] = {"row": row_of(mutant(files, seed, int(line)))}
        except Exception:  # which is what is looked for
            said = {"raised": traceback.format_exc()[-1_500:]}
        said["mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1_024
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
