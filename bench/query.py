"""How long `earmark query` takes over a million clips.

    python bench/query.py [--rows 1000000] [--folder DIR] [--record]

Makes an output of the real schema, 527 labels, 10,000 clips a shard: logits of each label around
-7, a few raised in every clip, so that it has some tags at a threshold of 0.2; one clip in a
thousand failed. Then each question is asked by the command itself, as a process, several times:
best, median, and CPU time.
`--folder` keeps the output for the next time. Prints JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # this folder is first in the path, the checkout is not in it
    sys.path.insert(0, str(ROOT))

from bench.record import append_results, machine, table  # noqa: E402
from pipeline.ledger import labels_parquet  # noqa: E402
from student.labels import audioset_labels  # noqa: E402
from transforms.write import ROWS_PER_GROUP, RowOptions, clips_schema  # noqa: E402

ROWS_PER_SHARD = 10_000
THRESHOLD = 0.2
ROUNDS = 5
DOG = next(label.index for label in audioset_labels() if label.name == "Dog")

COUNT = "SELECT name, count(*) AS clips FROM tags GROUP BY name ORDER BY clips DESC, name LIMIT 20"
QUESTIONS = {
    "count the clips": ["SELECT count(*) FROM clips"],
    "clips per tag": [COUNT],
    "--tag Dog, 20 rows": ["--tag", "Dog", "--limit", "20"],
    "--tag 'Dog>0.5', all to CSV": ["--tag", "Dog>0.5", "--format", "csv"],
    "--tag 'Dog>0.5' --sort Dog, 20 rows": ["--tag", "Dog>0.5", "--sort", "Dog", "--limit", "20"],
    "--under Animal, count by SQL": ["SELECT count(*) FROM clips WHERE has('Animal')"],
    "score('Dog') > 0.5, counted by SQL": ["SELECT count(*) FROM clips WHERE score('Dog') > 0.5"],
    "--tag 'Dog>0.1', below the threshold": ["--tag", "Dog>0.1", "--limit", "20"],
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="keep the output here, or use what is there")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--record", action="store_true", help="append a table to RESULTS.md")
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        output = folder / f"tags-{args.rows}"
        if not (output / "run.json").exists():
            make_output(output, args.rows)
        size_bytes = sum(file.stat().st_size for file in output.rglob("*.parquet"))
        about = machine()
        rows = []
        for name, arguments in QUESTIONS.items():
            took_s, cpu_s = zip(*(ask(output, arguments) for _ in range(args.rounds)), strict=True)
            rows.append(
                {
                    "question": name,
                    "best_s": min(took_s),
                    "median_s": statistics.median(took_s),
                    "cpu_s": min(cpu_s),
                }
            )
            print(name, rows[-1], file=sys.stderr)
    print(json.dumps({"rows": args.rows, "bytes": size_bytes, "machine": about, "times": rows}))
    if args.record:
        title = f"`bench/query.py`, {args.rows:,} clips, {size_bytes / 1e9:.2f} GB of Parquet"
        head = ("question", "best, s", "median, s", "CPU time, s")
        cells = [
            (r["question"].replace("|", "\\|"), *(f"{r[k]:.2f}" for k in list(r)[1:])) for r in rows
        ]
        append_results(title, about, table(head, cells))


def ask(output: Path, arguments: list[str]) -> tuple[float, float]:
    """(seconds from the command to its end, CPU time of all its threads).

    The files are in the page cache after the first time. CPU time shows what other work on the
    machine hides.
    """
    command = [sys.executable, "-m", "pipeline", "query", str(output), *arguments]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    took_s = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return took_s, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def make_output(output: Path, rows: int) -> None:
    random = np.random.default_rng(1)
    labels = audioset_labels()
    (output / "clips").mkdir(parents=True)
    thresholds = (THRESHOLD,) * len(labels)
    schema = clips_schema(len(labels), 768, RowOptions(thresholds))
    usual = random.normal(-7, 1, len(labels)).astype(np.float32)
    # A few labels are in many clips, most in few, as in AudioSet.
    popularity = 1 / (1 + random.permutation(len(labels)))
    popularity /= popularity.sum()
    for shard, first in enumerate(range(0, rows, ROWS_PER_SHARD)):
        with pq.ParquetWriter(
            output / "clips" / f"made-{shard:05d}-0123456789ab.parquet", schema, compression="zstd"
        ) as writer:
            for start in range(first, min(rows, first + ROWS_PER_SHARD), ROWS_PER_GROUP):
                end = min(rows, first + ROWS_PER_SHARD, start + ROWS_PER_GROUP)
                writer.write_table(clips(shard, start, end, usual, popularity, schema, random))
    (output / "labels.parquet").write_bytes(labels_parquet(labels, thresholds))
    scoring = {"labels": "", "thresholds": THRESHOLD, "top_k": None, "score_type": "float32",
               "chunks": False, "embeddings": False}  # fmt: skip
    run = {"id": "made", "fingerprint": "made", "scoring": scoring, "options": {},
           "checkpoint": {"name": "made", "labels": len(labels)}}  # fmt: skip
    (output / "run.json").write_text(json.dumps(run))


def clips(shard, start, end, usual, popularity, schema, random) -> pa.Table:
    count = end - start
    logits = usual + random.standard_normal((count, len(usual)), np.float32)
    for _ in range(3):
        raised = random.choice(len(usual), count, p=popularity)
        logits[np.arange(count), raised] += random.uniform(4, 9, count).astype(np.float32)
    scores = 1 / (1 + np.exp(-logits))
    failed = random.random(count) < 1e-3
    row, index = np.nonzero((scores >= np.float32(THRESHOLD)) & ~failed[:, None])
    score = scores[row, index]
    order = np.lexsort((-score, row))
    row, index, score = row[order], index[order], score[order]
    labels = audioset_labels()
    tag = pa.StructArray.from_arrays(
        [
            pa.array(index, pa.int16()),
            pa.array([label.mid for label in labels]).take(pa.array(index)),
            pa.array([label.name for label in labels]).take(pa.array(index)),
            pa.array(score, pa.float32()),
        ],
        fields=list(schema.field("tags").type.value_type),
    )
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=count))])
    values = {
        "clip_id": [f"made-{shard:05d}-0123456789ab/{n:08d}.flac" for n in range(start, end)],
        "shard": [f"gs://bucket/audio/made-{shard:05d}.tar"] * count,
        "member": [f"{n:08d}.flac" for n in range(start, end)],
        "start_s": [None] * count,
        "end_s": [None] * count,
        "duration_s": np.round(random.uniform(1, 10, count), 3),
        "sample_rate": np.full(count, 48_000),
        "channels": random.integers(1, 3, count),
        "codec": ["flac"] * count,
        "audio_xxh128": [random.bytes(16).hex() for _ in range(count)],
        "peak_dbfs": random.uniform(-20, 0, count).astype(np.float32),
        "rms_dbfs": random.uniform(-40, -20, count).astype(np.float32),
        "metadata": ['{"truth": []}'] * count,
        "error": [{"stage": "decode", "type": "NoAudio", "message": "the audio has no samples"}
                  if bad else None for bad in failed],
    }  # fmt: skip
    columns = []
    for column in schema:
        if column.name == "tags":
            array = pa.ListArray.from_arrays(
                pa.array(offsets, pa.int32()), tag, type=column.type, mask=pa.array(failed)
            )
        elif column.name == "scores":
            flat = pa.array(scores.ravel(), mask=np.repeat(failed, len(usual)))
            array = pa.FixedSizeListArray.from_arrays(flat, type=column.type)
        else:
            array = pa.array(values[column.name], column.type)
        columns.append(array)
    return pa.table(columns, schema=schema)


if __name__ == "__main__":
    main()
