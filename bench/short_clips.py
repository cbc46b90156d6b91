"""What a clip loses by being short, and whether repeating it helps more than zeros.

    python bench/short_clips.py --corpus ../shared/corpus --record

Takes clips that the bundled student never learned from and that nearly fill one of its chunks
(4.4 to 5.12 s), cuts the loudest stretch of 0.5 to 4 s out of each, and scores it padded with
zeros and repeated. Both are held against the whole clip: as this student scores it, padded with
zeros as by default, and as the teacher did. Prints JSON.

- mAP: macro, over the labels that at least 3 whole clips reach: 0.2 by the student, 0.3 by the
  teacher, over the same clips. The interval is of the difference, repeated less zero, over 500
  draws of the clips.
- top 1: the share of clips whose highest label is that of the whole clip.
- apart: the mean over clips of the largest difference between its scores and the whole's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # this folder is first in the path, the checkout is not in it
    sys.path.insert(0, str(ROOT))

from bench.record import append_results, machine, table  # noqa: E402
from evaluation.metrics import average_precision, bootstrap, interval  # noqa: E402
from student import Student  # noqa: E402
from student.feature_spec import FeatureSpec  # noqa: E402
from student.model import PADS  # noqa: E402
from transforms.decode import AudioDecoder  # noqa: E402
from transforms.read import read_clips  # noqa: E402
from transforms.records import EncodedClip, Shard  # noqa: E402

LEAST_CLIPS = 3  # that reach a label, for it to count
REACHED = {"student": 0.2, "teacher": 0.3}
DRAWS = 500

Floats = NDArray[np.float32]


def main() -> None:
    """Measures, prints, and records where that is asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=ROOT.parent / "shared" / "corpus")
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--checkpoint", default="bundled")
    parser.add_argument("--record", action="store_true", help="append a table to RESULTS.md")
    args = parser.parse_args()
    students = {pad: Student.load(args.checkpoint, "cpu", pad=pad) for pad in PADS}
    features = students["zero"].features
    found = dict(unseen(args.corpus, features, 1.1 * max(args.seconds)))
    names = sorted(found)[:: max(1, len(found) // args.clips)][: args.clips]
    wholes = [found[name] for name in names]
    references = {
        "student": students["zero"].score(wholes),
        "teacher": teacher_scores(args.corpus, names),
    }
    rows = [
        {"seconds": seconds} | held_against(references, cut(students, wholes, seconds))
        for seconds in [*args.seconds, None]
    ]
    about = machine()
    answer = {
        "checkpoint": args.checkpoint,
        "clips": len(names),
        "chunk_s": features.chunk_s,
        "least_s": 1.1 * max(args.seconds),
        "padding_is": normalised(features, 0.0),
        "silence_is": normalised(features, float(np.log(np.finfo(np.float32).eps))),
        "rows": rows,
        "machine": about,
    }
    print(json.dumps(answer, indent=2))
    if args.record:
        title = f"`short_clips.py`, {len(names)} clips, {args.checkpoint} student"
        append_results(title, about, lines(rows))


def unseen(corpus: Path, features: FeatureSpec, least_s: float) -> Iterator[tuple[str, Floats]]:
    """(clip_id, waveform) of clips of one chunk at most that the bundled student never learned from."""
    held_out = set((ROOT / "student" / "bundled" / "held_out.txt").read_text().split())
    for tar in sorted(corpus.glob("*.tar")):
        for clip in read_clips(Shard(tar.stem, str(tar), "tar", tar.stat().st_size)):
            assert isinstance(clip, EncodedClip), clip
            name = Path(clip.member).stem
            if not (tar.name.startswith("sharealike") or name in held_out):
                continue
            sound = np.concatenate(list(AudioDecoder(clip.audio).mono(features.sample_rate)))
            if least_s * features.sample_rate <= len(sound) <= features.chunk_samples:
                yield name, sound


def teacher_scores(corpus: Path, names: list[str]) -> Floats:
    """The stored scores of these clips, float32 [clips, labels]."""
    stored = pq.read_table(corpus / "teacher_scores.parquet", columns=["clip_id", "scores"])
    place = {name: at for at, name in enumerate(stored["clip_id"].to_pylist())}
    scores = stored["scores"].take([place[name] for name in names]).to_pylist()
    return np.array(scores, np.float32)


def cut(
    students: dict[Any, Student], wholes: list[Floats], seconds: float | None
) -> dict[str, Floats]:
    """Scores by padding of each clip's loudest stretch; of the whole for None."""
    if seconds is None:
        pieces = wholes
    else:
        samples = round(seconds * students["zero"].features.sample_rate)
        pieces = [loudest(whole, samples) for whole in wholes]
    return {pad: student.score(pieces) for pad, student in students.items()}


def loudest(sound: Floats, samples: int) -> Floats:
    """The stretch of so many samples with the most energy."""
    energy = np.concatenate([[0.0], np.cumsum(np.square(sound, dtype=np.float64))])
    start = int(np.argmax(energy[samples:] - energy[:-samples]))
    return sound[start : start + samples]


def held_against(references: dict[str, Floats], scores: dict[str, Floats]) -> dict[str, Any]:
    """How well the scores by padding agree with those of the whole clips."""
    answer: dict[str, Any] = {}
    for name, reference in references.items():
        truth = reference >= REACHED[name]
        truth = truth & (truth.sum(axis=0) >= LEAST_CLIPS)
        kept = truth.any(axis=0)
        draws, maps = {}, {}
        for pad, of_pad in scores.items():
            maps[pad] = float(np.nanmean(average_precision(truth[:, kept], of_pad[:, kept])))
            replicates = bootstrap(truth[:, kept], of_pad[:, kept], DRAWS)
            draws[pad] = replicates.values["macro_map"]
        gain = maps["repeat"] - maps["zero"]
        answer[name] = {
            "labels": int(kept.sum()),
            "map": {pad: round(value, 3) for pad, value in maps.items()},
            "map_gain": round(gain, 3),
            "map_gain_interval": [
                round(float(end), 3) for end in interval(draws["repeat"] - draws["zero"], gain)
            ],
            "top_1": {
                pad: round(float((s.argmax(axis=1) == reference.argmax(axis=1)).mean()), 3)
                for pad, s in scores.items()
            },
            "apart": {
                pad: round(float(np.abs(s - reference).max(axis=1).mean()), 3)
                for pad, s in scores.items()
            },
        }
    return answer


def normalised(features: FeatureSpec, log_mel: float) -> float:
    """What the student sees where the log-mel is this."""
    return round((log_mel - features.mean) / (2 * features.std), 3)


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table in Markdown."""
    head = [
        "cut to",
        "mAP, own whole: zero",
        "repeat",
        "gain (95 %)",
        "top 1: zero",
        "repeat",
        "mAP, teacher: zero",
        "repeat",
        "gain (95 %)",
        "top 1: zero",
        "repeat",
    ]
    body = []
    for row in rows:
        cells: list[object] = ["whole" if row["seconds"] is None else f"{row['seconds']:g} s"]
        for name in REACHED:
            low, high = row[name]["map_gain_interval"]
            cells += [row[name]["map"][pad] for pad in PADS]
            cells.append(f"{row[name]['map_gain']:+.3f} ({low:+.3f} to {high:+.3f})")
            cells += [row[name]["top_1"][pad] for pad in PADS]
        body.append(cells)
    return table(head, body)


if __name__ == "__main__":
    main()
