"""What there is to do: from the inputs that the user names to the shards that have no file yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.ledger import from_folder
from pipeline.options import AnnotateOptions, UsageError
from transforms.manifest import ManifestOptions
from transforms.meter import Meter
from transforms.progress import Progress
from transforms.records import WHOLE_FILES, Shard, audio_bytes_in
from transforms.shards import PACKED_SHARDS, find_shards, limit_shards, pack_shards, unpack_shards
from transforms.storage import Access, read_all


@dataclass
class Todo:
    """The shards to annotate, packed, and what is known of them all."""

    packets: list[bytes] = field(default_factory=list)  # of `pack_shards`
    shards: int = 0
    size_bytes: int = 0  # of audio and what is around it
    rows: int = 0  # of manifests, whose audio has a size that nobody has asked for
    max_clips: int | None = None  # where a limit says how many there will be

    def __iter__(self) -> Iterator[Shard]:
        for packet in self.packets:
            yield from unpack_shards(packet)

    def count(self, shard: Shard) -> None:
        """Counts a shard that is, or will be, among the packed ones."""
        self.shards += 1
        self.size_bytes += audio_bytes_in(shard)
        self.rows += shard.manifest.rows if shard.manifest is not None else 0

    def done(self, progress: Progress) -> float:
        """The share of the work that is done: by clips where they are known, else by bytes."""
        if self.max_clips or (self.rows and not self.size_bytes):
            return progress.clips / (self.max_clips or self.rows)
        if self.rows:  # clips of both kinds are one number, and so are their bytes
            return progress.shards / self.shards
        return progress.bytes / self.size_bytes if self.size_bytes else 0.0


class Packer:
    """Makes a `Todo` of shards that come one by one."""

    def __init__(self) -> None:
        self._packed, self._waiting = Todo(), list[Shard]()

    def add(self, shard: Shard) -> None:
        """Adds one shard."""
        self._waiting.append(shard)
        self._packed.count(shard)
        if len(self._waiting) == PACKED_SHARDS:
            self._pack()

    def todo(self) -> Todo:
        """All that were added."""
        self._pack()
        return self._packed

    def _pack(self) -> None:
        self._packed.packets.extend(pack_shards(self._waiting))
        self._waiting = []


@dataclass
class Planned:
    """What going through the inputs once has shown."""

    todo: Todo = field(default_factory=Todo)
    size_bytes: int = 0  # of all inputs, as `Todo` has it, and so are the rows
    rows: int = 0
    skipped: int = 0
    kept: Todo = field(default_factory=Todo)  # the skipped ones, which an earlier run finished
    ignored: Counter[str] = field(default_factory=Counter)
    divided: set[str] = field(default_factory=set)  # ids of shards that are parts of something
    notes: list[str] = field(default_factory=list)  # how manifests are read


def plan_inputs(
    inputs: tuple[str, ...],
    options: AnnotateOptions,
    access: Access,
    finished: set[str],
    meter: Meter,
    only: set[str] | None = None,
) -> Planned:
    """Goes through the shards once; only packed ones stay in memory.

    Args:
        inputs: of `named_inputs`.
        options: of the command line.
        access: how remote storage is used.
        finished: ids of shards that are left out of what is to do.
        meter: counts `list_retries`.
        only: ids of the shards that are not left out, whatever else there is.
    """
    planned = Planned()
    clips = 0
    kept = Packer()

    def unfinished() -> Iterator[Shard]:
        nonlocal clips
        for shard in shards_of(inputs, options, access, planned.ignored, meter, planned.notes):
            planned.size_bytes += audio_bytes_in(shard)
            planned.rows += shard.manifest.rows if shard.manifest is not None else 0
            if shard.kind not in WHOLE_FILES:
                planned.divided.add(shard.id)
            if only is not None and shard.id not in only:
                continue
            if shard.id in finished:
                kept.add(shard)
                continue
            planned.todo.count(shard)
            clips += shard.max_clips or 0
            yield shard

    planned.todo.packets.extend(pack_shards(unfinished()))
    planned.kept = kept.todo()
    planned.skipped = planned.kept.shards
    if options.limit is not None:
        planned.todo.max_clips = clips
    return planned


def shards_of(
    inputs: tuple[str, ...],
    options: AnnotateOptions,
    access: Access,
    ignored: Counter[str],
    meter: Meter | None = None,
    notes: list[str] | None = None,
) -> Iterator[Shard]:
    """The shards of the inputs, up to the limit."""
    manifests = ManifestOptions(
        options.path_column,
        options.id_column,
        options.start_column,
        options.end_column,
        options.audio_root,
    )
    found = find_shards(
        inputs, ignored, options.files_per_shard, access, meter, options.output, manifests, notes
    )
    return iter(limit_shards(found, options.limit, access)) if options.limit else found


def named_inputs(options: AnnotateOptions, access: Access) -> tuple[str, ...]:
    """The inputs of the command line, and those that files name, one a line."""
    inputs = list(options.inputs)
    for file in options.inputs_from:
        try:
            text = read_all(file, access).decode("utf-8")
        except (OSError, ValueError, ImportError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"--inputs-from {file!r} cannot be read: {reason}") from error
        lines = [line.strip() for line in text.splitlines()]
        named = [line for line in lines if line and not line.startswith("#")]
        if not named:
            raise UsageError(f"--inputs-from {file!r} names no input; expected one a line")
        inputs += [from_folder(options.lists_start_in, line) for line in named]
    return tuple(inputs)
