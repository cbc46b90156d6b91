"""Where the time of a run went, from its metrics: a table, the bottleneck, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The two sides of a shard work at once, in two threads, with a queue of decoded audio between.
# Of each: what it does, and its idle time.
SIDES = {
    "decoding": (("read", "decode", "resample"), "decoding_idle"),
    "model": (("features", "transfer", "model", "write"), "model_idle"),
}

# What costs the time where a stage is the bottleneck, and what helps.
_CURES = {
    "read": (
        "the model waits for the storage or the disk",
        "bring data and workers together, or read more shards at once with more workers or threads",
    ),
    "decode": (
        "the model waits for decoders",
        "--decode-processes, more workers, or more vCPUs for each model",
    ),
    "resample": (
        "the model waits for audio to be brought to its sample rate",
        "more vCPUs or threads for each model, or audio stored at that rate",
    ),
    "features": (
        "decoded audio waits for its spectrograms",
        "a GPU, which computes them almost for nothing, or more workers",
    ),
    "transfer": (
        "decoded audio waits for copies to the device",
        "a GPU with a faster link, or fewer workers on one GPU",
    ),
    "model": (
        "decoded audio waits for the model, as it should",
        "a faster device or more of them, or --dtype reduced for a student 512 wide or wider",
    ),
    "write": (
        "decoded audio waits for rows to be written",
        "a faster disk or a bucket nearer by, a smaller table (--score-type float16, no --chunks), "
        "or more workers",
    ),
    "decoding_other": (
        "the model waits for audio to be handled between the decoder and the queue",
        "more workers or threads; longer clips or fewer files of metadata",
    ),
    "model_other": (
        "decoded audio waits for what goes on around the model",
        "more workers or threads, and larger shards",
    ),
    "list": (
        "nothing is annotated until all inputs are listed",
        "fewer and larger shards instead of loose files, and globs that match less",
    ),
    "load": (
        "nothing is annotated until the student is there",
        "more clips a run, or a checkpoint that is near (in the image, or in the region)",
    ),
}


def profile_of(metrics: Mapping[str, Any], wall_s: float) -> dict[str, Any] | None:
    """Where the time went, for `summary.json`.

    Args:
        metrics: of `pipeline.run.metrics_of`.
        wall_s: of the run, without its listing.

    Returns:
        `clips`, `shards`; `shards_s`: seconds of all shards, those at once counted each;
        `before`: of "list" and "load" (the slowest student) `s` and `share` of `wall_s` with
        the listing; for the sides "decoding" and "model" each stage's `s`, `share` of
        all seconds of its side (those of several processes, or of a GPU, may be more than
        `shards_s`) and `ms_per_clip`; `bottleneck`; `advice`, a
        sentence. None where no shard was finished.
    """
    shards = metrics.get("shard_msec")
    if not shards or not shards["sum"]:
        return None
    clips = metrics.get("clips", 0)
    shards_s = shards["sum"] / 1e3
    sides_s = {side: _side_s(side, metrics, shards_s) for side in SIDES}
    before_s = {
        "list": _sum(metrics, "list_usec") / 1e6,
        "load": metrics.get("load_model_latency_milli_secs", {}).get("max", 0) / 1e3,
    }
    whole_s = wall_s + before_s["list"]
    before = {
        stage: {"s": round(s, 3), "share": round(s / whole_s, 4)} for stage, s in before_s.items()
    }
    profile: dict[str, Any] = {
        "clips": clips,
        "shards": shards["count"],
        "shards_s": round(shards_s, 3),
        "before": before,
    }
    for side, stages_s in sides_s.items():
        side_s = sum(stages_s.values())
        profile[side] = {
            stage: {
                "s": round(s, 3),
                "share": round(s / side_s, 4),
                "ms_per_clip": round(1e3 * s / clips, 4) if clips else None,
            }
            for stage, s in stages_s.items()
        }
    profile["bottleneck"] = _bottleneck(profile)
    profile["advice"] = _advice(profile)
    return profile


def _sum(metrics: Mapping[str, Any], name: str) -> float:
    return float(metrics.get(name, {}).get("sum", 0))


def _side_s(side: str, metrics: Mapping[str, Any], shards_s: float) -> dict[str, float]:
    """Seconds of each stage of a side; "other" is what no stage accounts for."""
    stages, idle = SIDES[side]
    seconds = {stage: _sum(metrics, f"{stage}_usec") / 1e6 for stage in stages}
    idle_s = _sum(metrics, f"{idle}_usec") / 1e6
    other_s = max(0.0, shards_s - idle_s - sum(seconds.values()))
    return {**seconds, "other": other_s, "idle": idle_s}


def _bottleneck(profile: Mapping[str, Any]) -> str:
    """A stage, "list" or "load", or "decoding_other" or "model_other"."""
    slowest = max(profile["before"], key=lambda stage: profile["before"][stage]["share"])
    if profile["before"][slowest]["share"] >= 0.5:
        return str(slowest)
    # The side that waits less is the one that the other waits for.
    side = min(SIDES, key=lambda side: profile[side]["idle"]["s"])
    stages = {stage: of["share"] for stage, of in profile[side].items() if stage != "idle"}
    most = max(stages, key=lambda stage: stages[stage])
    return f"{side}_other" if most == "other" else most


def _advice(profile: Mapping[str, Any]) -> str:
    """One sentence: the value, the cause, the cure."""
    bottleneck = profile["bottleneck"]
    cause, cure = _CURES[bottleneck]
    if bottleneck in profile["before"]:
        what = "Listing" if bottleneck == "list" else "Loading the student"
        took = profile["before"][bottleneck]
        return f"{what} took {took['s']:.1f} s, {100 * took['share']:.0f} % of the run: {cause}; {cure}"
    side = next(s for s in SIDES if bottleneck in (*SIDES[s][0], f"{s}_other"))
    stage = "other" if bottleneck.endswith("_other") else bottleneck
    share = profile[side][stage]["share"]
    other_idle_s = profile["model" if side == "decoding" else "decoding"]["idle"]["s"]
    waits = other_idle_s / profile["shards_s"]
    return (
        f"{stage.capitalize()} takes {100 * share:.0f} % of the time on its side, and the other "
        f"side is idle for {100 * waits:.0f} % of the shards' time: {cause}; {cure}"
    )
