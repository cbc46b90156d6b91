"""What of the clips that are judged was used before: to train the student, or to fit its tags.

Numbers of such clips flatter. What was used is written down where it was used: `earmark distill`
writes the clips on both sides into the student's folder, and a file of thresholds that was fitted
names a sample of the clips of its fit. Here both are held against the clips that are judged, where
the files are still at hand; where they are not, nothing is said.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evaluation.scores import Source, open_parquet
from student import BUNDLED
from student.checkpoint import (
    BUNDLED_DIRECTORY,
    CheckpointError,
    parse_thresholds,
    read_checkpoint,
)
from transforms.storage import is_local

# In a student's folder: what judged it (few, for `--only`), and what it learned from.
HELD_OUT_FILE = "held_out.csv"
LEARNED_FILE = "learned_from.parquet"
COLUMNS = ("clip_id", "member", "audio_xxh128", "shard")  # of both
THRESHOLDS_FILE = "thresholds.json"  # in a student's folder

# Clips that a fit is known by: where one in thirty of its clips is judged, about 3 of these are.
_SAMPLED = 100
_DIGITS = 12  # of a digest, hexadecimal


@dataclass(frozen=True)
class Before:
    """Where it is written that clips were used, and how many of those that are judged were."""

    place: str
    clips: int


def sample_of(clip_ids: Sequence[str], hashes: Sequence[str | None]) -> str:
    """A sample of clips by digest, as text: those whose digest is lowest, so that it is always the same.

    Args:
        clip_ids: of the clips.
        hashes: `audio_xxh128` of each, where it is known: then a clip is known by its bytes.
    """
    return " ".join(sorted(set(_digests(clip_ids, hashes)))[:_SAMPLED])


def _digests(clip_ids: Sequence[str], hashes: Sequence[str | None]) -> Iterator[str]:
    for clip_id, of_bytes in zip(clip_ids, hashes, strict=True):
        known_by = of_bytes or clip_id
        yield hashlib.sha256(known_by.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGITS]


def tuned_on(
    source: Source, clip_ids: Sequence[str], hashes: Sequence[str | None]
) -> Before | None:
    """The clips judged of which the thresholds of the tags were fitted, as far as a sample says.

    Args:
        source: whose tags are judged.
        clip_ids, hashes: of the clips that are judged.

    Returns:
        None where the thresholds were not fitted, or their file is not at hand or another by now,
        or none of the clips is known to be among those of the fit.
    """
    file = _thresholds_file(source.run)
    if file is None:
        return None
    try:
        stated = json.loads(file.read_text("utf-8"))
        thresholds = parse_thresholds(stated, source.labels, file)
        sample = set(stated["fitted_on"]["some_clips"].split())
        clips = int(stated["fitted_on"]["clips"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError):
        return None  # it is no part of what was asked for
    now = {label.name: one for label, one in zip(source.labels, thresholds, strict=True)}
    if now != source.run.get("thresholds") or not sample:
        return None
    share = len(sample & set(_digests(clip_ids, hashes))) / len(sample)
    return Before(str(file), min(len(clip_ids), round(share * clips))) if share else None


def _thresholds_file(run: dict[str, Any]) -> Path | None:
    """The local file that an output's thresholds are from."""
    checkpoint = run.get("checkpoint", {})
    if checkpoint.get("thresholds") == "file":
        file = run.get("options", {}).get("thresholds")
        return Path(file) if isinstance(file, str) and is_local(file) else None
    folder = _folder(run)
    if checkpoint.get("thresholds") == "checkpoint" and folder is not None:
        return folder / THRESHOLDS_FILE
    return None


def _folder(run: dict[str, Any]) -> Path | None:
    """The local folder of the checkpoint that made an output."""
    name = run.get("checkpoint", {}).get("name")
    if not isinstance(name, str) or not is_local(name):
        return None
    folder = BUNDLED_DIRECTORY if name == BUNDLED else Path(name)
    return folder if folder.is_dir() else None


def _made(folder: Path, run: dict[str, Any]) -> bool:
    """Whether the checkpoint in `folder` is still the one that made an output."""
    try:
        found = read_checkpoint(str(folder)).weights_sha256
    except CheckpointError:
        return False
    return bool(found == run.get("checkpoint", {}).get("weights_sha256"))


def learned_from(
    source: Source, clip_ids: Sequence[str], hashes: Sequence[str | None]
) -> Before | None:
    """The clips judged that the student learned from, where `earmark distill` made it on this machine.

    Args:
        source: whose scores are judged.
        clip_ids, hashes: of the clips that are judged.

    Returns:
        None where nothing is known, the folder holds another student by now, or none of them is
        among those.
    """
    folder = _folder(source.run)
    if folder is None or not (folder / LEARNED_FILE).is_file() or not _made(folder, source.run):
        return None
    by_name: dict[str, str] = {}  # clip_id -> its hash, empty where it is not known
    by_bytes: set[str] = set()
    judged_ids, judged_hashes = pa.array(clip_ids, pa.string()), pa.array(hashes, pa.string())
    try:
        with (folder / LEARNED_FILE).open("rb") as stream, open_parquet(stream) as file:
            columns = ["clip_id", "audio_xxh128"]
            for batch in file.iter_batches(columns=columns, use_threads=False):
                ids, of_bytes = batch.columns
                named = pc.is_in(ids, judged_ids)
                by_name.update(
                    zip(
                        ids.filter(named).to_pylist(),
                        of_bytes.filter(named).to_pylist(),
                        strict=True,
                    )
                )
                same = pc.is_in(of_bytes, judged_hashes.drop_null())
                by_bytes.update(of_bytes.filter(same).to_pylist())
    except (OSError, pa.ArrowException):
        return None  # it is no part of what was asked for
    # Clips of another corpus may have the same names: where both hashes are known, they decide.
    clips = sum(
        judged in by_bytes or (clip_id in by_name and not (judged and by_name[clip_id]))
        for clip_id, judged in zip(clip_ids, hashes, strict=True)
    )
    return Before(str(folder), clips) if clips else None


def held_out_csv(rows: Sequence[Sequence[str]]) -> str:
    """`HELD_OUT_FILE` of rows of `COLUMNS`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    return text.getvalue()


def read_learned(file: Path) -> list[tuple[str, ...]]:
    """The rows of a `LEARNED_FILE`; none where there is none."""
    if not file.is_file():
        return []
    with file.open("rb") as stream, open_parquet(stream) as parquet:
        table = parquet.read(list(COLUMNS), use_threads=False)
    return list(zip(*(table[name].to_pylist() for name in COLUMNS), strict=True))


def write_learned(file: Path, rows: Sequence[Sequence[str]]) -> None:
    """Writes `LEARNED_FILE` of rows of `COLUMNS`."""
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in COLUMNS]
    table = pa.table(columns, pa.schema([(name, pa.string()) for name in COLUMNS]))
    pq.write_table(table, file, compression="zstd")
