"""Where the time of a run went: stages, shares, the bottleneck and the advice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr
from numpy.typing import NDArray
from rich.console import Console

from pipeline.display import show_profile
from pipeline.profile import _CURES, SIDES, profile_of
from student.model import Student
from transforms import annotate, decode, read_tar
from transforms.meter import DISTRIBUTIONS

SLEEP_S = 0.03  # never less than that


def metrics(**seconds: float) -> dict[str, Any]:
    """Metrics of two shards of 50 clips, 10 s in all; seconds of each stage."""

    def observed(total: float) -> dict[str, int]:
        return {"count": 2, "sum": round(total), "min": 0, "max": round(total)}

    named = {f"{stage}_usec": observed(1e6 * s) for stage, s in seconds.items() if stage != "load"}
    load = observed(1e3 * seconds.get("load", 0.0))
    return {
        "clips": 50,
        "shard_msec": observed(10_000),
        "load_model_latency_milli_secs": load,
    } | named


def test_each_side_adds_up_to_the_time_of_the_shards() -> None:
    profile = profile_of(
        metrics(read=1, decode=2, resample=0.5, decoding_idle=6, model=7, write=1, model_idle=1.5),
        9,
    )
    assert profile is not None
    assert (profile["clips"], profile["shards"], profile["shards_s"]) == (50, 2, 10.0)
    for side in SIDES:
        assert sum(stage["share"] for stage in profile[side].values()) == pytest.approx(1)
        assert sum(stage["s"] for stage in profile[side].values()) == pytest.approx(10)
    assert profile["decoding"]["other"] == {"s": 0.5, "share": 0.05, "ms_per_clip": 10.0}
    assert profile["model"]["other"]["s"] == 0.5
    assert profile["model"]["model"] == {"s": 7.0, "share": 0.7, "ms_per_clip": 140.0}


def test_the_side_that_waits_less_is_the_bottleneck_whatever_the_sides_add_up_to() -> None:
    """Six processes decode for 60 s within 10 s, and are idle for half of these."""
    profile = profile_of(metrics(decode=60, decoding_idle=5, model=8.5, model_idle=1), 10)
    assert profile is not None
    assert profile["bottleneck"] == "model"
    assert "the other side is idle for 50 %" in profile["advice"]


def test_a_gpu_that_works_while_its_thread_waits_is_no_more_than_all() -> None:
    profile = profile_of(metrics(model=9, model_idle=6), 9)
    assert profile is not None
    assert profile["model"]["other"]["s"] == 0
    assert sum(stage["share"] for stage in profile["model"].values()) == pytest.approx(1)


@pytest.mark.parametrize("stage", [stage for stages, _ in SIDES.values() for stage in stages])
def test_the_bottleneck_is_the_slowest_stage_of_the_side_that_waits_less(stage: str) -> None:
    side, other = ("decoding", "model") if stage in SIDES["decoding"][0] else ("model", "decoding")
    profile = profile_of(metrics(**{stage: 7, f"{side}_idle": 1, f"{other}_idle": 8}), 60)
    assert profile is not None
    assert profile["bottleneck"] == stage
    cause, cure = _CURES[stage]
    assert profile["advice"] == (
        f"{stage.capitalize()} takes 70 % of the time on its side, and the other side is idle for "
        f"80 % of the shards' time: {cause}; {cure}"
    )


def test_what_no_stage_accounts_for_can_be_the_bottleneck() -> None:
    profile = profile_of(metrics(decode=1, model_idle=9), 60)
    assert profile is not None
    assert profile["bottleneck"] == "decoding_other"
    assert profile["advice"].startswith("Other takes 90 % of the time on its side")


@pytest.mark.parametrize(("stage", "word"), [("list", "Listing"), ("load", "Loading the student")])
def test_what_comes_before_the_shards_can_be_the_bottleneck(stage: str, word: str) -> None:
    wall_s = 10.0 if stage == "list" else 40.0
    profile = profile_of(metrics(model=9, **{stage: 30.0}), wall_s)
    assert profile is not None
    assert profile["before"][stage] == {"s": 30.0, "share": 0.75}
    assert profile["bottleneck"] == stage
    assert profile["advice"].startswith(f"{word} took 30.0 s, 75 % of the run: ")


def test_without_shards_there_is_none() -> None:
    assert profile_of({}, 1.0) is None
    assert profile_of({"clips": 3}, 1.0) is None


def test_every_stage_is_a_metric_and_every_bottleneck_has_its_cure() -> None:
    for side, (stages, idle) in SIDES.items():
        assert {f"{stage}_usec" for stage in (*stages, idle)} <= DISTRIBUTIONS.keys()
        assert {*stages, f"{side}_other"} <= _CURES.keys()
    assert {"list", "load"} <= _CURES.keys()


def test_what_is_shown() -> None:
    profile = profile_of(metrics(read=1, decode=2, decoding_idle=6, model=7, model_idle=1.5), 9)
    console = Console(record=True, width=100)
    show_profile(profile, console)
    text = console.export_text()
    assert "2 shards took 10.0 s of the workers' time" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["decode", "2.000", "20.0", "%", "40.000"] in lines
    assert ["model", "7.000", "70.0", "%", "140.000"] in lines
    assert profile is not None and f"Bottleneck: model. {profile['advice']}." in text
    show_profile(None, console)
    assert "No profile" in console.export_text()


# ------------------------------------------------------------------- of a run


@pytest.fixture
def shards(
    tmp_path: Path,
    make_tar: Callable[..., Path],
    encoded: Callable[..., bytes],
    noise: Callable[..., NDArray[np.float32]],
) -> Path:
    """A tar of six clips at 22.05 kHz, which must be resampled."""
    members = [(f"{i}.flac", encoded(noise(9_000, i), 22_050, "flac")) for i in range(6)]
    (tmp_path / "in").mkdir()
    make_tar(tmp_path / "in" / "a.tar", members)
    return tmp_path / "in"


def slowed(function: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*given: Any, **named: Any) -> Any:
        time.sleep(SLEEP_S)
        return function(*given, **named)

    return slow


def profile_in(output: Path) -> dict[str, Any]:
    profile: dict[str, Any] = json.loads((output / "summary.json").read_text())["profile"]
    return profile


def test_a_run_shows_and_stores_it(
    earmark: Callable[..., str], shards: Path, tmp_path: Path
) -> None:
    said = earmark({}, "annotate", shards, "-o", tmp_path / "out", "--profile")
    profile = profile_in(tmp_path / "out")
    assert f"Bottleneck: {profile['bottleneck']}" in said
    assert (profile["clips"], profile["shards"]) == (6, 1)
    for side, (stages, _) in SIDES.items():
        assert list(profile[side]) == [*stages, "other", "idle"]
        assert sum(s["share"] for s in profile[side].values()) == pytest.approx(1, abs=0.001)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert "profile" not in run["options"]
    again = earmark({}, "annotate", shards, "-o", tmp_path / "out", "--profile")
    assert "No profile" in again
    assert profile_in(tmp_path / "out") == profile


def test_it_is_stored_but_not_shown_unless_asked_for(
    earmark: Callable[..., str], shards: Path, tmp_path: Path
) -> None:
    assert "Bottleneck" not in earmark({}, "annotate", shards, "-o", tmp_path / "out")
    assert profile_in(tmp_path / "out")["clips"] == 6


class SlowResampler(soxr.ResampleStream):
    def resample_chunk(self, *given: Any, **named: Any) -> Any:
        time.sleep(SLEEP_S)
        return super().resample_chunk(*given, **named)


@pytest.mark.parametrize(
    ("side", "stage", "where", "name", "slow"),
    [
        ("decoding", "read", read_tar, "spool", slowed(read_tar.spool)),
        ("decoding", "decode", decode, "_measure", slowed(decode._measure)),
        ("decoding", "resample", decode.soxr, "ResampleStream", SlowResampler),
        ("model", "write", annotate, "clip_row", slowed(annotate.clip_row)),
        ("model", "idle", read_tar, "spool", slowed(read_tar.spool)),
        ("decoding", "idle", annotate, "clip_row", slowed(annotate.clip_row)),
    ],
)
def test_what_a_stage_takes_is_seen_as_its_own(
    earmark: Callable[..., str],
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    side: str,
    stage: str,
    where: Any,
    name: str,
    slow: Any,
) -> None:
    monkeypatch.setattr(where, name, slow)
    # In a thread: a process would not know of what is slow here.
    earmark({}, "annotate", shards, "-o", tmp_path / "out", "--decode-processes", 0)
    took = profile_in(tmp_path / "out")[side]
    assert took[stage]["s"] >= 6 * SLEEP_S - 0.001
    assert sum(t["share"] for t in took.values()) == pytest.approx(1, abs=0.001)


def test_the_student_tells_its_stages(
    earmark: Callable[..., str], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {"features": 3.0, "transfer": 4.0, "model": 5.0}
    monkeypatch.setattr(Student, "take_stage_s", lambda student: dict(stages))
    earmark({}, "annotate", shards, "-o", tmp_path / "out")
    took = profile_in(tmp_path / "out")["model"]
    assert {stage: took[stage]["s"] for stage in stages} == stages


@pytest.mark.parametrize("other", ["--dry-run", "--detach"])
def test_a_run_that_nobody_waits_for_has_none(
    earmark: Callable[..., str], shards: Path, tmp_path: Path, other: str
) -> None:
    said = earmark({}, "annotate", shards, "-o", tmp_path / "out", "--profile", other, code=2)
    assert f"--profile tells of a run that is waited for, {other} of none" in said
    assert not (tmp_path / "out").exists()
