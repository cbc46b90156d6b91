"""The clips that the bundled student learns from, as they lie in the corpus's tars."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transforms.read import read_clips
from transforms.records import EncodedClip
from transforms.shards import plan_shards

PERMISSIVE = "permissive-*.tar"  # the share-alike tars stay out of what is Apache-2.0


def corpus_clips(folder: Path) -> Iterator[EncodedClip]:
    """The permissively licensed clips, in order; `audio` is open until the next one is read."""
    for shard in plan_shards([str(folder / PERMISSIVE)]).shards:
        for clip in read_clips(shard):
            if not isinstance(clip, EncodedClip):
                raise clip.error
            yield clip
