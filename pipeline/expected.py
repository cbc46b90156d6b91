"""What was expected of a run beside what it came to: `estimate.json` against `summary.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

FORMAT = "earmark.estimate/1"
ESTIMATE_FILE = "estimate.json"

# What a run and its estimate must have in common to be held against each other, of `run.json`'s
# "scoring": what the time and the size of the table depend on.
COMPARED = (
    "weights_sha256", "config_sha256", "dtype", "score_type", "chunks", "embeddings", "limit",
    "chunk_hop_samples", "pad", "segments",
)  # fmt: skip

_NUMBERS = ("clips", "audio_s", "audio_bytes", "output_bytes", "wall_s")


def compared(
    content: bytes | None,
    scoring: Mapping[str, Any],
    shards: int,
    actual: Mapping[str, float | None],
) -> dict[str, Any] | None:
    """An estimate beside what became of it, for `summary.json`.

    Args:
        content: of `estimate.json`; None where there is none.
        scoring: of the run's `run.json`.
        shards: that the run did.
        actual: what of `clips`, `audio_s`, `audio_bytes`, `output_bytes` and `wall_s` it came to;
            what is None or absent is left out.

    Returns:
        For each of these `expected`, `low`, `high`, `actual` and `ratio` (actual to expected),
        or `not_compared`, a sentence. None where there is no estimate.
    """
    if content is None:
        return None
    try:
        stated = json.loads(content)
        if stated["format"] != FORMAT:
            raise ValueError(stated["format"])
        if refusal := _refusal(stated, scoring, shards):
            return {"not_compared": refusal}
        numbers: dict[str, Any] = {}
        for name in _NUMBERS:
            came_to = actual.get(name)
            if came_to is None or (expected := _stated(stated, name)) is None:
                continue
            ratio = round(came_to / expected["expected"], 4) if expected["expected"] else None
            numbers[name] = {**expected, "actual": came_to, "ratio": ratio}
        return numbers
    except (ValueError, KeyError, TypeError, IndexError) as error:
        return {"not_compared": f"{ESTIMATE_FILE} cannot be read ({type(error).__name__}: {error})"}


def _refusal(stated: Mapping[str, Any], scoring: Mapping[str, Any], shards: int) -> str | None:
    if stated["shards"] != shards:
        return f"the estimate is of {stated['shards']:,} shards, this run did {shards:,}"
    others = [name for name in COMPARED if stated["scoring"].get(name) != scoring.get(name)]
    if others:
        return f"the estimate is of a run with another {', '.join(others)}"
    return None


def _stated(stated: Mapping[str, Any], name: str) -> dict[str, float] | None:
    """The range of a number; the time is that of one worker like the machine of the estimate."""
    if name == "wall_s":
        alone = [entry for entry in stated["workers"] if entry["workers"] == 1]
        return dict(alone[0]["run_s"]) if alone and stated["source"] is None else None
    return dict(stated[name])


def sentence(estimate: Mapping[str, Any]) -> str:
    """One line on how near an estimate came."""
    if "not_compared" in estimate:
        return f"Not held against its estimate: {estimate['not_compared']}."
    names = {
        "clips": "clips", "audio_s": "audio", "audio_bytes": "bytes", "output_bytes": "output",
        "wall_s": "time",
    }  # fmt: skip
    parts = [
        f"{names[name]} {100 * (of['ratio'] - 1):+.0f} %"
        for name, of in estimate.items()
        if of["ratio"] is not None
    ]
    return f"Beside its estimate: {', '.join(parts)}."
