"""The clips that a student learns from: which they are, what is known of them, how they sound.

Clips are found once (`find_clips` reads every shard, decodes nothing) and then read again and
again: as a stream, decoded anew in each epoch, or from a cache that holds them decoded.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from evaluation.scores import NAME_KINDS, EvaluationError, Names, Source, join, match, names_of
from evaluation.truth import Truth, known_names, parse_labels, resolve
from student.feature_spec import FRAME_SAMPLES, FeatureSpec
from student.labels import Label
from training.presets import Recipe
from training.request import Split
from transforms.decode import AudioDecoder
from transforms.read import read_clips
from transforms.records import ClipError, EncodedClip, Shard, name_of, unique
from transforms.storage import DEFAULT_ACCESS, Access, forget_clients

# A longer clip's scores say little about a piece of it: annotate it with --chunks, or cut it.
MAX_CLIP_S = 30.0

_SHUFFLED_CLIPS = 256  # of a stream, held decoded by each worker: 82 MB of 10 s
# Where the names of a clip have its hash and its member.
HASH, MEMBER = NAME_KINDS.index("audio_xxh128"), NAME_KINDS.index("member")
_CACHED_AT_ONCE = 64  # clips: 10 s of int16 each are 20 MB


class ClipsError(ValueError):
    """There is nothing to learn from; the message says what was looked for and found."""


@dataclass
class ClipTable:
    """What is known of some clips, row by row."""

    ids: list[str] = field(default_factory=list)  # as `clip_id` of an output is
    names: list[Names] = field(default_factory=list)  # what they may be known by elsewhere
    groups: list[str] = field(default_factory=list)
    stated: list[Any] = field(default_factory=list)  # own labels, as the metadata states them
    shards: list[int] = field(default_factory=list)  # places of the shards that they are in
    truths: list[tuple[int, ...] | None] = field(default_factory=list)  # own labels; None: unknown
    scores: NDArray[np.float32] | None = None  # the teacher's, [clips, labels]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Sequence[int]) -> ClipTable:
        """The table of some rows."""

        def of(column: list[Any]) -> list[Any]:
            return [column[row] for row in rows]

        return ClipTable(
            of(self.ids),
            of(self.names),
            of(self.groups),
            of(self.stated),
            of(self.shards),
            of(self.truths) if self.truths else [],
            None if self.scores is None else self.scores[list(rows)],
        )

    def truth(self, labels: int) -> NDArray[np.bool_]:
        """Own labels, bool [clips, labels]; no label where nothing is said of a clip."""
        matrix = np.zeros((len(self), labels), bool)
        for row, own in enumerate(self.truths):
            matrix[row, list(own or ())] = True
        return matrix

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """Which clips have labels of their own, bool [clips]."""
        return np.array([own is not None for own in self.truths], bool)


@dataclass
class Found:
    """The clips of the inputs, each on one side, and why others are on none."""

    train: ClipTable = field(default_factory=ClipTable)
    validation: ClipTable = field(default_factory=ClipTable)
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> clips
    fields: Counter[str] = field(default_factory=Counter)  # of the metadata -> clips that have it
    held_by_value: int = 0  # clips with the value of `Split.hold_out`


def find_clips(
    shards: Iterable[Shard],
    split: Split,
    *,
    label_field: str | None = None,
    only_validation: bool = False,
    limit: int | None = None,
    access: Access = DEFAULT_ACCESS,
) -> Found:
    """Goes through the shards once, without decoding, and deals their clips to the two sides.

    Args:
        shards: what to read.
        split: who is held out.
        label_field: the field of the clips' metadata that states their labels.
        only_validation: all clips are held out, whatever `split` says.
        limit: stop after so many clips.
        access: how remote storage is used.
    """
    found, read = Found(), 0
    for place, shard in enumerate(shards):
        seen: dict[str, int] = {}
        for clip in read_clips(shard, access):
            if limit is not None and read >= limit:
                return found
            read += 1
            clip_id = unique(f"{shard.id}/{name_of(clip)}", seen)
            if not isinstance(clip, EncodedClip):
                found.skipped[f"unreadable: {clip.error.type}"] += 1
                continue
            found.fields.update(key for key, value in clip.metadata.items() if value is not None)
            if split.hold_out is not None:
                name, value = split.hold_out
                found.held_by_value += str(clip.metadata.get(name)) == value
            held_out = only_validation or split.is_held_out(clip.member, clip.metadata)
            table = found.validation if held_out else found.train
            table.ids.append(clip_id)
            table.names.append(names_of(clip_id, clip.member, clip.xxh128))
            group = clip.metadata.get(split.group_by) if split.group_by else None
            table.groups.append(clip_id if group is None else str(group))
            table.stated.append(clip.metadata.get(label_field) if label_field else None)
            table.shards.append(place)
    return found


def join_scores(found: Found, sources: Sequence[Source]) -> None:
    """Gives the clips the scores that a source has of them; the others are left out and counted.

    Both sides are joined at once: a row that is exactly a clip of one side must not be taken
    for a clip of the other that only has a similar name.

    Raises:
        EvaluationError: a source cannot be read, or its names fit several clips.
    """
    names = [*found.train.names, *found.validation.names]
    scores: NDArray[np.float32] | None = None
    known = np.zeros(len(names), bool)
    for source in sources:
        matched = match(source, names, "the data")
        broken = ~np.isfinite(matched.scores).all(axis=1)
        if broken.any():
            clip_id = next(iter(names[matched.clips[broken][0]][0]))
            raise EvaluationError(
                f"{source.uri!r} holds a score of clip {clip_id!r} that is no number "
                f"({int(broken.sum()):,} clips have such); score them anew"
            )
        if scores is None:
            scores = np.zeros((len(names), len(source.labels)), np.float32)
        new = ~known[matched.clips]
        scores[matched.clips[new]] = matched.scores[new]
        known[matched.clips] = True
    assert scores is not None
    of_train = len(found.train)
    found.train.scores, found.validation.scores = scores[:of_train], scores[of_train:]
    if not known.all():
        found.skipped["without teacher scores"] += int((~known).sum())
        found.train = found.train.take(np.flatnonzero(known[:of_train]).tolist())
        found.validation = found.validation.take(np.flatnonzero(known[of_train:]).tolist())


def join_truth(found: Found, labels: Sequence[Label], truth: Truth | None) -> Counter[str]:
    """Sets the clips' own labels, from a truth or from what their metadata states.

    Returns:
        Labels that are stated and that the checkpoint does not know -> clips.

    Raises:
        EvaluationError: labels are stated, and the checkpoint knows none of them; or a name of
            the truth fits several clips.
    """
    sides = (found.train, found.validation)
    if truth is None:
        known = known_names(labels)
        stated = [
            (clip_id, names, value)
            for table in sides
            for clip_id, names, value in zip(table.ids, table.names, table.stated, strict=True)
        ]
        rows = [row for row, (_, _, value) in enumerate(stated) if value is not None]
        truth = Truth(
            "the clips' metadata",
            tuple(stated[row][0] for row in rows),
            tuple(stated[row][1] for row in rows),
            tuple(parse_labels(stated[row][2], known) for row in rows),
        )
        pairs = list(enumerate(rows))
    else:
        names = [of_clip for table in sides for of_clip in table.names]
        joined = join(truth.names, names, truth.name, "the data")
        # Clips of equal bytes are what one of them is.
        pairs = [*joined.rows.items(), *((place, row) for row, place in joined.repeated.items())]
    resolved = resolve(truth, labels, [place for place, _ in pairs])
    truths: list[tuple[int, ...] | None] = [None] * sum(map(len, sides))
    for (_, row), own in zip(pairs, resolved.matrix, strict=True):
        truths[row] = tuple(np.flatnonzero(own).tolist())
    found.train.truths = truths[: len(found.train)]
    found.validation.truths = truths[len(found.train) :]
    return resolved.unknown


@dataclass(frozen=True)
class Wanted:
    """Which clips to read, for those who read: the shards that hold any, and a row for each id."""

    shards: list[Shard]
    rows: dict[str, int]
    content: str  # digest of the clips' bytes: other bytes under the same names are another cache

    @classmethod
    def of(cls, table: ClipTable, shards: Sequence[Shard]) -> Wanted:
        """The clips of a table that was made from these shards."""
        digest = hashlib.sha256()
        for names in table.names:
            digest.update("".join(sorted(names[HASH])).encode())
        return cls(
            [shards[place] for place in sorted(set(table.shards))],
            {clip_id: row for row, clip_id in enumerate(table.ids)},
            digest.hexdigest(),
        )


def read_sounds(
    shards: Sequence[Shard],
    rows: Mapping[str, int],
    content: str,
    sample_rate: int,
    access: Access,
) -> Iterator[dict[str, Any]]:
    """Yields the sound of each clip in `rows`: `row`, `waveform`, `fault`.

    `waveform` is int16, as bytes, mono at `sample_rate`; empty where `fault` says why. `content`
    changes nothing that is read: it tells one cache from another.
    """
    forget_clients()  # this may be a worker process, and its parent's connections are not its own
    for shard in shards:
        seen: dict[str, int] = {}
        for clip in read_clips(shard, access):
            clip_id = unique(f"{shard.id}/{name_of(clip)}", seen)
            row = rows.get(clip_id)
            if row is None or not isinstance(clip, EncodedClip):
                continue
            waveform, fault = decode(clip, sample_rate)
            yield {"row": row, "waveform": waveform.tobytes(), "fault": fault}


def decode(clip: EncodedClip, sample_rate: int) -> tuple[NDArray[np.int16], str]:
    """(int16 [samples], "") of a clip, or (nothing, what is wrong with it)."""
    blocks, samples = [], 0
    try:
        for block in AudioDecoder(clip.audio).mono(sample_rate, clip.start_s, clip.end_s):
            blocks.append(block)
            samples += len(block)
            if samples > MAX_CLIP_S * sample_rate:
                return np.zeros(0, np.int16), f"longer than {MAX_CLIP_S:g} s"
    except ClipError as error:
        return np.zeros(0, np.int16), f"undecodable: {error.type}"
    if samples < FRAME_SAMPLES:
        return np.zeros(0, np.int16), "shorter than a frame"
    waveform = np.concatenate(blocks)
    return (np.clip(waveform, -1.0, 1.0) * 32_767).astype(np.int16), ""


_FEATURES = datasets.Features(
    {
        "row": datasets.Value("int64"),
        "waveform": datasets.Value("large_binary"),
        "fault": datasets.Value("string"),
    }
)


def cache_sounds(
    wanted: Wanted,
    sample_rate: int,
    folder: Path,
    workers: int = 0,
    access: Access = DEFAULT_ACCESS,
) -> datasets.Dataset:
    """The clips decoded once, in Arrow files that are mapped into memory.

    `folder` may hold other caches: each is known by its clips, their bytes and the sample rate.
    """
    processes = min(workers, len(wanted.shards))
    return datasets.Dataset.from_generator(
        read_sounds,
        features=_FEATURES,
        cache_dir=str(folder),
        gen_kwargs=_reading(wanted, sample_rate, access),
        num_proc=processes if processes > 1 else None,
        writer_batch_size=_CACHED_AT_ONCE,
    )


def _reading(wanted: Wanted, sample_rate: int, access: Access) -> dict[str, Any]:
    return {
        "shards": wanted.shards,
        "rows": wanted.rows,
        "content": wanted.content,
        "sample_rate": sample_rate,
        "access": access,
    }


def audible(cached: datasets.Dataset, clips: int, skipped: Counter[str]) -> datasets.Dataset:
    """Those of a cache that have a sound; of `clips` that were wanted, counts the others by fault."""
    faults = np.array(cached["fault"], dtype=object)
    skipped.update(fault for fault in faults if fault)
    if len(cached) < clips:
        skipped["gone since they were found"] += clips - len(cached)
    kept = np.flatnonzero(faults == "")
    return cached if len(kept) == len(faults) else cached.select(kept)


def audio_s_of(cached: datasets.Dataset, sample_rate: int) -> float:
    """Seconds of sound in a cache."""
    size_bytes = 0
    for batch in cached.select_columns("waveform").with_format("arrow").iter(1_000):
        size_bytes += pc.sum(pc.binary_length(batch["waveform"])).as_py()
    return size_bytes / 2 / sample_rate


class CachedClips(torch.utils.data.Dataset[dict[str, Any]]):
    """A cache as the training's sampler draws from it: by (place, number of the draw)."""

    def __init__(self, cached: datasets.Dataset) -> None:
        self.cached = cached

    def __len__(self) -> int:
        return len(self.cached)

    def __getitem__(self, drawn: tuple[int, int]) -> dict[str, Any]:
        place, draw = drawn
        return self.cached[place] | {"draw": draw}


class Draws(torch.utils.data.Sampler[tuple[int, int]]):
    """An epoch's order: every clip once, or some more often where `weights` say so.

    Yields (place, number of the draw); no two draws of a training have the same number.
    """

    def __init__(self, clips: int, seed: int, weights: NDArray[np.float64] | None = None) -> None:
        self._clips, self._seed, self._weights = clips, seed, weights
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes next; each has an order of its own."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._clips

    def __iter__(self) -> Iterator[tuple[int, int]]:
        random = np.random.default_rng([self._seed, self.epoch])
        order = (
            random.permutation(self._clips)
            if self._weights is None
            else random.choice(self._clips, self._clips, p=self._weights)
        )
        first = self.epoch * self._clips
        yield from ((int(place), first + number) for number, place in enumerate(order))


class StreamedClips(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Clips read and decoded anew in every epoch, in an order of its own.

    Shards are shuffled, and clips within a buffer. Worker processes share the shards.
    """

    def __init__(
        self,
        wanted: Wanted,
        sample_rate: int,
        seed: int,
        access: Access = DEFAULT_ACCESS,
    ) -> None:
        stream = datasets.IterableDataset.from_generator(
            read_sounds, features=_FEATURES, gen_kwargs=_reading(wanted, sample_rate, access)
        )
        self._stream = stream.shuffle(seed=seed, buffer_size=_SHUFFLED_CLIPS)
        self._clips, self._epoch = len(wanted.rows), 0

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes next."""
        self._epoch = epoch
        self._stream.set_epoch(epoch)

    def __len__(self) -> int:
        return self._clips

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for example in self._stream:
            yield example | {"draw": self._epoch * self._clips + example["row"]}


def drawing_weights(
    targets: NDArray[np.floating[Any]],
    labelled: NDArray[np.bool_],
    balance: float,
    labelled_weight: float,
    least: float = 0.1,
) -> NDArray[np.float64]:
    """How often each clip is drawn, float64 [clips], sum 1.

    Args:
        targets: scores, or 0 and 1, [clips, labels].
        labelled: which clips have labels of their own, [clips].
        balance: the share of draws that goes to clips by the rarity of their labels; the rest
            is uniform.
        labelled_weight: how often a clip with labels of its own is drawn, to one without.
        least: a target below this is no label.
    """
    present = np.where(targets >= least, targets, 0).astype(np.float64)
    # 10 clips' worth is added, so that a label with a single clip does not take everything.
    rarity = (present / (targets.sum(axis=0, dtype=np.float64) + 10)).sum(axis=1)
    weights = np.full(len(targets), 1 / len(targets))
    if rarity.any():
        weights = (1 - balance) * weights + balance * rarity / rarity.sum()
    weights = weights * np.where(labelled, labelled_weight, 1.0)
    return weights / weights.sum()


@dataclass(frozen=True)
class Batches:
    """Makes batches of tensors from examples; runs in the worker processes.

    Each clip is cut to what the student hears at once, at a place that depends only on the
    seed and on the number of the draw.
    """

    truths: Sequence[tuple[int, ...] | None]  # by row
    scores: NDArray[np.float32] | None  # by row
    labels: int
    spec: FeatureSpec
    recipe: Recipe

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Tensors by name: those of `training.augment.Sounds`; `draws` and `rows`, int64 [clips]."""
        clips, samples = len(examples), self.spec.chunk_samples
        waveforms = np.zeros((clips, samples), np.float32)
        lengths = np.full(clips, FRAME_SAMPLES, np.int64)
        weights = np.ones(clips, np.float32)
        truth = np.zeros((clips, self.labels), np.float32)
        scores = np.zeros((clips, self.labels), np.float32)
        labelled = np.zeros(clips, bool)
        for place, example in enumerate(examples):
            row = example["row"]
            own = self.truths[row]
            if own is not None:
                labelled[place] = True
                truth[place, list(own)] = 1
            if self.scores is not None:
                scores[place] = self.scores[row]
            sound = np.frombuffer(example["waveform"], np.int16)
            if len(sound) == 0:
                weights[place] = 0
                continue
            piece = self._cut(sound, example["draw"])
            waveforms[place, : len(piece)] = piece
            lengths[place] = len(piece)
        return {
            "waveforms": torch.from_numpy(waveforms).div_(32_767),
            "lengths": torch.from_numpy(lengths),
            "scores": torch.from_numpy(scores),
            "truth": torch.from_numpy(truth),
            "labelled": torch.from_numpy(labelled),
            "weights": torch.from_numpy(weights),
            "draws": torch.tensor([example["draw"] for example in examples]),
            "rows": torch.tensor([example["row"] for example in examples]),
        }

    def _cut(self, sound: NDArray[np.int16], draw: int) -> NDArray[np.int16]:
        recipe, random = self.recipe, np.random.default_rng([self.recipe.seed, draw])
        wanted = self.spec.chunk_samples
        cropped = random.random() < recipe.crop_share
        crop_s = random.uniform(recipe.crop_min_s, recipe.crop_max_s)
        if cropped:
            wanted = min(wanted, max(FRAME_SAMPLES, int(crop_s * self.spec.sample_rate)))
        room = len(sound) - wanted
        anywhere = recipe.random_start or cropped
        start = int(random.integers(0, room + 1)) if anywhere and room > 0 else 0
        return sound[start : start + wanted]
