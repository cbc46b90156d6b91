"""The clips that the bundled student learns from and is measured on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from student.features import FRAME_SAMPLES, POWER_FLOOR, FeatureSpec, LogMel
from student.labels import audioset_labels
from training.sounds import SAMPLE_RATE, SOUNDS, synthesise
from transforms.decode import AudioDecoder
from transforms.read import read_clips
from transforms.records import EncodedClip
from transforms.shards import plan_shards

MAX_CLIP_FRAMES = 1_000  # 10 s, the longest clip of the corpus
PERMISSIVE = "permissive-*.tar"  # the share-alike tars stay out of what is Apache-2.0
ESC10_VALIDATION_FOLD = 4
HELD_OUT_SHARE = 0.1  # of the other clip groups


@dataclass
class Clips:
    """Clips as log-mel power with their targets."""

    ids: list[str]
    log_mel: Tensor  # float16 [clips, MAX_CLIP_FRAMES, mel bins], log power, floor where empty
    frames: Tensor  # int64 [clips]
    targets: Tensor  # float32 [clips, labels], what the student learns
    own_labels: list[tuple[int, ...]]  # true labels where known (ESC-10, synthetic), else ()
    own_class: list[str]  # the true class where known, else ""

    def __len__(self) -> int:
        return len(self.ids)


def read_corpus(folder: Path, spec: FeatureSpec, limit: int) -> tuple[Clips, Clips]:
    """The permissively licensed clips: `(to train on, held out)`.

    Held out are ESC-10's fold 4 and a tenth of all other groups: a group shares a
    source recording, so a split by clip would leak. Targets are the teacher's
    scores; for training clips of ESC-10 the first of the clip's own labels is lifted
    to 0.8 where the teacher missed it.
    """
    table = pq.read_table(folder / "teacher_scores.parquet", columns=["clip_id", "scores"])
    column = table["scores"].combine_chunks()
    scores = column.values.to_numpy(zero_copy_only=False).reshape(len(column), -1)
    teacher = dict(zip(table["clip_id"].to_pylist(), scores.astype(np.float32), strict=True))
    index_of = {label.mid: label.index for label in audioset_labels()}
    mel = LogMel(spec)

    train, held_out = _Columns(), _Columns()
    for number, clip in enumerate(corpus_clips(folder)):
        if limit and number >= limit:
            break
        facts = clip.metadata
        clip_id = clip.member.partition(".")[0]
        target = teacher[clip_id].copy()
        true = tuple(index_of[mid] for mid in facts.get("labels", ()))
        side = held_out if is_held_out(facts) else train
        if true and side is train:
            target[true[0]] = max(target[true[0]], 0.8)
        waveform = np.concatenate(list(AudioDecoder(clip.audio).mono(SAMPLE_RATE)))
        name = facts.get("esc10_class", "")
        side.add(clip_id, log_mel_of(mel, waveform), target, true, name)
    return train.stacked(), held_out.stacked()


def corpus_clips(folder: Path) -> Iterator[EncodedClip]:
    """The clips of the corpus as they lie in its tars, in order."""
    for shard in plan_shards([str(folder / PERMISSIVE)]).shards:
        for clip in read_clips(shard):
            if not isinstance(clip, EncodedClip):
                raise clip.error
            yield clip


def corpus_facts(folder: Path) -> list[dict[str, Any]]:
    """What the corpus states of each clip: repo, licence, author, group, ..."""
    return [clip.metadata for clip in corpus_clips(folder)]


def is_held_out(facts: dict[str, Any]) -> bool:
    """Whether a clip is kept from training."""
    if facts.get("esc10_fold"):
        return facts["esc10_fold"] == ESC10_VALIDATION_FOLD
    share = int(hashlib.sha256(facts["group"].encode()).hexdigest()[:8], 16) / 2**32
    return share < HELD_OUT_SHARE


def synthetic(spec: FeatureSpec, random: np.random.Generator, count: int) -> Clips:
    """`count` instances of each synthetic sound, 1 to 8 s, with hard targets."""
    index_of = {label.name: label.index for label in audioset_labels()}
    mel = LogMel(spec)
    columns = _Columns()
    for sound in SOUNDS:
        true = tuple(index_of[name] for name in sound.labels)
        for number in range(count):
            target = np.zeros(len(index_of), np.float32)
            target[list(true)] = 0.7
            target[true[0]] = 0.9
            waveform = synthesise(sound, random, random.uniform(1.0, 8.0))
            clip_id = f"synthetic-{sound.name}-{number}"
            columns.add(clip_id, log_mel_of(mel, waveform), target, true, sound.name)
    return columns.stacked()


def join(a: Clips, b: Clips) -> Clips:
    """`a` followed by `b`."""
    return Clips(
        a.ids + b.ids,
        torch.cat([a.log_mel, b.log_mel]),
        torch.cat([a.frames, b.frames]),
        torch.cat([a.targets, b.targets]),
        a.own_labels + b.own_labels,
        a.own_class + b.own_class,
    )


def log_mel_of(mel: LogMel, waveform: NDArray[np.float32]) -> Tensor:
    """float16 [frames, mel bins], log power before any normalisation."""
    if len(waveform) < FRAME_SAMPLES:
        return torch.zeros((0, mel.spec.num_mel_bins), dtype=torch.float16)
    power = mel.power(torch.from_numpy(waveform)[None])[0, :MAX_CLIP_FRAMES]
    return power.clamp_min(POWER_FLOOR).log().to(torch.float16)


class _Columns:
    """Clips as they come in, stacked into tensors at the end."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, Tensor, NDArray[np.float32], tuple[int, ...], str]] = []

    def add(
        self,
        clip_id: str,
        log_mel: Tensor,
        target: NDArray[np.float32],
        own_labels: tuple[int, ...],
        own_class: str,
    ) -> None:
        self._rows.append((clip_id, log_mel, target, own_labels, own_class))

    def stacked(self) -> Clips:
        ids, features, targets, own_labels, own_class = (
            list(c) for c in zip(*self._rows, strict=True)
        )
        shape = (len(ids), MAX_CLIP_FRAMES, features[0].shape[1])
        log_mel = torch.full(shape, math.log(POWER_FLOOR), dtype=torch.float16)
        for row, feature in enumerate(features):
            log_mel[row, : len(feature)] = feature
        frames = torch.tensor([len(feature) for feature in features])
        return Clips(
            ids, log_mel, frames, torch.from_numpy(np.stack(targets)), own_labels, own_class
        )
