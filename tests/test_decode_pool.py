from __future__ import annotations

import dataclasses
import gc
import gzip
import io
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, cast

import av
import numpy as np
import pytest
import soundfile
import xxhash
from numpy.typing import NDArray

from student.feature_spec import FeatureSpec
from transforms.decode import Limits, take_decode_s
from transforms.decode_clip import decode_clips
from transforms.decode_pool import DecodePool
from transforms.read import read_clips
from transforms.records import Chunk, ClipEnd, ClipError, EncodedClip, Shard, UnreadableClip

Noise = Callable[..., NDArray[np.float32]]
Encoded = Callable[..., bytes]

FEATURES = FeatureSpec(num_mel_bins=32, max_length=128)  # chunks of 1.28 s

# Stands before the real soundfile, to which a clip comes that ffmpeg refuses.
CRASHING_SOUNDFILE = """
import os, sys, time
folder = os.path.dirname(__file__)
sys.path.remove(folder)
del sys.modules["soundfile"]
import soundfile
sys.path.insert(0, folder)
real = soundfile.SoundFile

def sound_file(file):
    word = file.read(8)
    file.seek(0)
    if word == b"abort...":
        os.abort()
    if word == b"exit 3..":
        os._exit(3)
    if word == b"hang....":
        time.sleep(600)
    if word == b"raise...":
        raise ValueError("a fault of the decoder's", 7)
    if word == b"strange.":
        class Strange(Exception):
            pass
        raise Strange("no other process knows it")
    if word == b"once....":
        mark = os.path.join(folder, "mark")
        if not os.path.exists(mark):
            open(mark, "w").close()
            os.abort()
    return real(file)

soundfile.SoundFile = sound_file
"""


@pytest.fixture(scope="module")
def pools() -> Iterator[Callable[[int], DecodePool]]:
    """Pools of so many processes, made once: what one test leaves must not matter to the next."""
    made: dict[int, DecodePool] = {}

    def pool(processes: int) -> DecodePool:
        if processes not in made:
            made[processes] = DecodePool(FEATURES, processes)
        return made[processes]

    yield pool
    for one in made.values():
        one.close()


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a pool made here crash, hang or raise over clips that say so."""
    (tmp_path / "soundfile.py").write_text(CRASHING_SOUNDFILE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


@pytest.fixture
def some(noise: Noise, encoded: Encoded) -> list[EncodedClip | UnreadableClip]:
    """Clips of no, one and several chunks."""
    return [
        clip(f"{seconds}.wav", encoded(noise(int(seconds * 16_000), seed=7)), seconds=seconds)
        for seconds in (0.4, 3.1, 0.01, 1.28, 9.0, 2.0, 0.7)
    ]


def clip(member: str, content: bytes, **metadata: Any) -> EncodedClip:
    return EncodedClip(
        member,
        io.BytesIO(content),
        len(content),
        xxhash.xxh128_hexdigest(content),
        metadata,
    )


def plain(event: Chunk | ClipEnd) -> tuple[Any, ...]:
    """An event as a value that compares, waveforms bit by bit."""
    if isinstance(event, Chunk):
        return event.start_s, event.end_s, event.waveform.dtype, event.waveform.tobytes()
    error = event.error and (event.error.stage, event.error.type, event.error.message)
    return *(value for name, value in vars(event).items() if name != "error"), error


def rewound(clips: list[Any]) -> Iterator[Any]:
    for one in clips:
        if isinstance(one, EncodedClip):
            one.audio.seek(0)
        yield one


def expected(clips: list[Any]) -> list[tuple[Any, ...]]:
    return [plain(event) for event in decode_clips(rewound(clips), FEATURES)]


def given(pool: DecodePool, clips: list[Any]) -> list[tuple[Any, ...]]:
    return [plain(event) for event in pool.decode(rewound(clips))]


def ends(events: list[Chunk | ClipEnd]) -> list[ClipEnd]:
    return [event for event in events if isinstance(event, ClipEnd)]


def gone(pid: int) -> bool:
    """Whether a process has ended; nobody but an init that may be absent waits for orphans."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def until(true: Callable[[], bool], within_s: float = 20.0) -> None:
    limit = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < limit, "it does not come about"
        time.sleep(0.01)


def compressed(format: str, encoder: str, sample_rate: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(encoder, rate=sample_rate, layout="stereo")
        tone = 0.5 * np.sin(2 * np.pi * 500 * np.arange(3 * sample_rate) / sample_rate)
        pair = np.stack([tone, tone[::-1]]).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(pair, "fltp", "stereo")
        frame.sample_rate = sample_rate
        for piece in (frame, None):
            container.mux(stream.encode(piece))
    return file.getvalue()


# ------------------------------------------------------------------------ the same


@pytest.fixture(scope="module")
def many(noise: Noise, encoded: Encoded) -> list[Any]:
    """Clips of many codecs, rates and lengths; broken ones; some that are in no shard."""
    flac = encoded(noise(50_000), format="flac")
    riff = encoded(noise(50_000))
    clips: list[Any] = [
        clip(f"{rate}-{channels}.{format}", encoded(noise(shape, seed=rate), rate, format), n=rate)
        for format, rates in {
            "wav": (1_000, 16_000, 48_000), "flac": (16_000, 44_100), "mp3": (16_000, 44_100),
            "ogg": (22_050, 44_100), "aiff": (8_000,), "w64": (16_000,),
        }.items()
        for rate in rates
        for channels in (1, 2)
        for shape in [(int(2.7 * rate), channels)]
    ]  # fmt: skip
    return [
        *clips,
        clip("a.opus", encoded(noise(40_000), format="ogg", subtype="OPUS")),
        clip("a.m4a", compressed("mp4", "aac", 44_100)),
        clip("a.mkv", compressed("matroska", "libopus", 48_000)),
        UnreadableClip("a.wav", ClipError("read", "Link", "the member is a link"), {"n": 1}),
        clip("no.wav", b"no audio"),
        clip("empty.wav", b""),
        clip("cut.flac", flac[: len(flac) * 9 // 10]),
        clip("zero.wav", encoded(np.zeros(0, np.float32))),
        clip("short.wav", encoded(noise(399))),
        clip("frame.wav", encoded(noise(400))),
        clip("nan.wav", encoded(np.full(9_000, np.nan), subtype="FLOAT")),
        clip("rate.wav", riff[:24] + b"\1\0\0\0" + riff[28:]),
        clip("silent.wav", encoded(np.zeros(30_000, np.float32)), deep={"x": [1, None]}),
        UnreadableClip(None, ClipError("read", "BrokenShard", "it is broken"), {}),
    ]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_same_as_in_this_process(
    pools: Callable[[int], DecodePool], many: list[Any], processes: int
) -> None:
    assert given(pools(processes), many) == expected(many)


def test_the_same_where_chunks_overlap(many: list[Any]) -> None:
    with DecodePool(FEATURES, 2, hop_samples=5_000) as pool:
        found = given(pool, many)
    assert found == [
        plain(event) for event in decode_clips(rewound(many), FEATURES, hop_samples=5_000)
    ]
    assert len(found) > len(expected(many))


@pytest.mark.parametrize("kind", ["files", "tar"])
def test_the_same_from_a_shard(
    pools: Callable[[int], DecodePool],
    many: list[Any],
    make_tar: Callable[..., Path],
    tmp_path: Path,
    kind: str,
) -> None:
    contents = {c.member: c.audio.getvalue() for c in many if isinstance(c, EncodedClip)}
    if kind == "tar":
        file = make_tar(tmp_path / "a.tar", contents.items())
        shard = Shard("a", str(file), "tar", file.stat().st_size)
    else:
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
        shard = Shard("a", str(tmp_path), "files", 0, files=(*contents, "missing.wav"))
    found = [plain(event) for event in pools(2).decode(read_clips(shard))]
    assert found == [plain(event) for event in decode_clips(read_clips(shard), FEATURES)]
    assert len(found) > len(contents)


def test_the_same_over_real_files(pools: Callable[[int], DecodePool], shared: Path) -> None:
    """Under their names, and in memory without; the format is a guess that heeds the name."""
    zoo = shared / "audio-zoo"
    files = sorted(
        str(file.relative_to(zoo))
        for file in zoo.rglob("*")
        if file.is_file() and file.suffix != ".csv" and file.stat().st_size < 100_000
    )
    shard = Shard("zoo", str(zoo), "files", 0, files=tuple(files))
    in_memory = [clip(name, (zoo / name).read_bytes()) for name in files]
    in_process = [plain(event) for event in decode_clips(read_clips(shard), FEATURES)]
    assert [plain(event) for event in pools(2).decode(read_clips(shard))] == in_process
    assert given(pools(2), in_memory) == expected(in_memory)


def test_a_large_clip_in_memory_and_on_disk(
    pools: Callable[[int], DecodePool],
    noise: Noise,
    encoded: Encoded,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More than a place keeps, and more than one takes."""
    monkeypatch.setattr("transforms.decode_pool._IN_MEMORY_BYTES", 6 << 20)
    small = encoded(noise(30_000))
    fits = encoded(noise((700_000, 3)), 96_000)
    large = encoded(noise((900_000, 4)), 96_000)
    assert len(fits) > 4 << 20 and len(large) > 6 << 20
    spooled = tempfile.SpooledTemporaryFile(max_size=1 << 20)  # noqa: SIM115
    spooled.write(large)
    still = tempfile.SpooledTemporaryFile(max_size=1 << 20)  # noqa: SIM115
    still.write(small)
    clips = [
        clip("fits", fits),
        clip("small", small),
        clip("large", large),
        EncodedClip("on disk", spooled, len(large), "x", {}),
        EncodedClip("in memory", still, len(small), "x", {}),
    ]
    assert given(pools(1), clips) == expected(clips)
    assert still.name is None, "it was written to disk only to be decoded"


def test_a_part_of_a_recording(
    pools: Callable[[int], DecodePool], noise: Noise, encoded: Encoded
) -> None:
    whole = clip("a", encoded(noise(100_000), format="flac"))
    clips = [
        dataclasses.replace(whole, start_s=1.5, end_s=4.25, name="bark"),
        dataclasses.replace(whole, start_s=7.0),
    ]
    for one in clips:
        assert given(pools(1), [one]) == expected([one])
    bark, beyond = (ends(list(pools(1).decode(rewound([one]))))[0] for one in clips)
    assert (bark.start_s, bark.end_s, bark.name, bark.duration_s) == (1.5, 4.25, "bark", 2.75)
    assert beyond.error is not None and beyond.error.type == "OutOfRange"


def test_the_limits_are_those_of_the_processes(noise: Noise, encoded: Encoded) -> None:
    limits = Limits(clip_bytes=100_000, duration_s=2.0)
    clips = [clip("a", encoded(noise(40_000))), clip("b", encoded(noise(60_000)))]
    with DecodePool(FEATURES, 1, limits=limits) as pool:
        found = [plain(event) for event in pool.decode(rewound(clips))]
    assert found == [plain(event) for event in decode_clips(rewound(clips), FEATURES, limits)]
    assert [event[-1][1] for event in found if event[0] in ("a", "b")] == ["TooLong", "TooLarge"]


def test_a_clip_that_is_unpacked_as_it_is_read(
    pools: Callable[[int], DecodePool], noise: Noise, encoded: Encoded, tmp_path: Path
) -> None:
    """Its descriptor is that of the packed file."""
    content = encoded(noise(40_000))
    with gzip.open(tmp_path / "a.wav.gz", "wb") as file:
        file.write(content)
    with gzip.open(tmp_path / "a.wav.gz", "rb") as audio:
        clips = [EncodedClip("a", cast(BinaryIO, audio), len(content), "x", {})]
        assert given(pools(1), clips) == expected(clips)
        assert len(expected(clips)) == 3


def test_a_chunk_is_valid_for_good(pools: Callable[[int], DecodePool], some: list[Any]) -> None:
    before = [
        (event, event.waveform.tobytes())
        for event in pools(1).decode(rewound(some))
        if isinstance(event, Chunk)
    ]
    list(pools(1).decode(rewound(some)))
    assert len(before) > 10
    assert all(event.waveform.tobytes() == content for event, content in before)


def test_the_time_that_processes_took_is_known(
    pools: Callable[[int], DecodePool], some: list[Any]
) -> None:
    pool = pools(2)
    pool.take_decode_s()
    started = time.perf_counter()
    given(pool, some)
    most_s = 2 * (time.perf_counter() - started)
    taken = pool.take_decode_s()
    assert taken["decode"] > 0 and sum(taken.values()) <= most_s
    assert sum(pool.take_decode_s().values()) == 0
    given(pool, some[:1])
    assert set(pool.take_decode_s()) == set(taken) == set(take_decode_s())


def test_a_process_loads_neither_torch_nor_beam() -> None:
    code = "import sys, transforms.decode_pool; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    heavy = {"torch", "apache_beam", "transformers", "pyarrow", "fsspec", "requests"}
    assert "transforms.decode" in loaded.stdout
    assert not heavy & set(loaded.stdout.split())


# ---------------------------------------------------------------- crashes and hangs


@pytest.mark.usefixtures("words")
def test_a_clip_that_ends_its_process_is_given_up_and_no_other(
    some: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    bad = {
        2: (b"abort...", "SIGABRT"),
        5: (b"exit 3..", "exit code 3"),
        6: (b"abort...", "SIGABRT"),
    }
    clips = list(some)
    for place, (word, _) in bad.items():
        clips.insert(place, clip(f"bad {place}", word * 10, n=place))
    with DecodePool(FEATURES, 2) as pool:
        before = pool.process_ids
        found = list(pool.decode(rewound(clips)))
        assert set(pool.process_ids) != set(before)
        assert all(gone(pid) for pid in set(before) - set(pool.process_ids))
    for place, (_, how) in bad.items():
        end = ends(found)[place]
        assert (end.member, end.metadata, end.size_bytes) == (f"bad {place}", {"n": place}, 80)
        assert end.error is not None
        assert (end.error.stage, end.error.type) == ("decode", "Crashed")
        assert end.error.message == f"the decoder was ended by {how}"
    others = [event for event in found if not getattr(event, "member", "").startswith("bad")]
    assert [plain(event) for event in others] == expected(some)
    assert "'bad 2'" in caplog.text


@pytest.mark.usefixtures("words")
def test_a_clip_that_ends_its_process_once_is_decoded(some: list[Any], tmp_path: Path) -> None:
    clips = [*some[:2], clip("once", b"once...." * 10), *some[2:]]
    with DecodePool(FEATURES, 1) as pool:
        found = given(pool, clips)
    assert (tmp_path / "mark").exists()
    assert found == expected(clips)  # here soundfile is the real one, and refuses it


def test_a_process_killed_amid_a_clip_costs_nothing(
    noise: Noise, encoded: Encoded, some: list[Any]
) -> None:
    clips = [*some, clip("long", encoded(noise(40 * 16_000))), *some]
    with DecodePool(FEATURES, 2, chunks_ahead=2) as pool:
        found, before_long = [], len(expected(some))
        for event in pool.decode(rewound(clips)):
            found.append(plain(event))
            if len(found) in (before_long + 3, before_long + 9):
                for pid in pool.process_ids:  # one waits for room, one for its turn
                    os.kill(pid, signal.SIGKILL)
    assert found == expected(clips)


@pytest.mark.usefixtures("words")
def test_a_clip_that_hangs_is_given_up(some: list[Any]) -> None:
    clips = [*some[:3], clip("hangs", b"hang...." * 9), *some[3:]]
    with DecodePool(FEATURES, 1, clip_timeout_s=0.7) as pool:
        found = list(pool.decode(rewound(clips)))
    end = ends(found).pop(3)
    assert end.error is not None
    assert (end.error.stage, end.error.type) == ("decode", "TimedOut")
    assert end.error.message == "the decoder made no progress for 0.7 s"
    assert [plain(event) for event in found if event is not end] == expected(some)


def test_a_slow_consumer_is_no_hang(noise: Noise, encoded: Encoded) -> None:
    clips = [clip("long", encoded(noise(20 * 16_000)))]
    found = []
    with DecodePool(FEATURES, 1, chunks_ahead=1, clip_timeout_s=0.2) as pool:
        for event in pool.decode(clips):
            found.append(plain(event))
            if len(found) in (1, 3):
                time.sleep(0.5)
    assert found == expected(clips)


@pytest.mark.usefixtures("words")
def test_what_is_no_clips_fault_is_raised(some: list[Any]) -> None:
    with DecodePool(FEATURES, 1) as pool:
        for word, kind, message in [
            (b"raise...", ValueError, "a fault of the decoder's"),
            (b"strange.", RuntimeError, "decoding failed"),
        ]:
            found = []
            with pytest.raises(kind, match=message) as raised:
                for event in pool.decode(rewound([some[1], clip("bad", word), some[4]])):
                    found.append(plain(event))
            assert found == expected(some[1:2])
            assert "sound_file" in str(raised.value.__cause__)
        assert given(pool, some) == expected(some)


def test_processes_that_cannot_start_are_no_clips_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, some: list[Any]
) -> None:
    (tmp_path / "soxr.py").write_text("raise SystemExit(4)")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with DecodePool(FEATURES, 1) as pool:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="ended with exit code 4 before it began a clip"):
                list(pool.decode(rewound(some)))


def test_an_error_of_the_reader_comes_in_its_place(
    pools: Callable[[int], DecodePool], some: list[Any]
) -> None:
    def clips() -> Iterator[Any]:
        yield from rewound(some)
        raise OSError("the disk is gone")

    found = []
    with pytest.raises(OSError, match="the disk is gone"):
        for event in pools(2).decode(clips()):
            found.append(plain(event))
    assert found == expected(some)
    assert given(pools(2), some) == expected(some)


# ----------------------------------------------------------------- bounds and ends


def test_an_hour_takes_no_more_memory_than_a_few_chunks(tmp_path: Path) -> None:
    file = tmp_path / "hour.wav"
    wave = (100 * np.sin(np.arange(1_000) / 7) + 128).astype(np.uint8)
    with soundfile.SoundFile(file, "w", 1_000, 1, "PCM_U8") as sound:
        sound.write(np.tile((wave / 128.0 - 1).astype(np.float32), 3_600))
    features = FeatureSpec()
    shard = Shard("a", str(tmp_path), "files", 0, files=("hour.wav",))
    with DecodePool(features, 1) as pool:
        tracemalloc.start()
        try:
            samples, end = 0, None
            for event in pool.decode(read_clips(shard)):
                if isinstance(event, Chunk):
                    samples += len(event.waveform)
                end = event
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        resident = Path(f"/proc/{pool.process_ids[0]}/status").read_text()
    assert isinstance(end, ClipEnd)
    assert (end.error, end.duration_s) == (None, 3_600.0)
    assert samples >= 3_600 * 16_000
    assert peak < 8 * 4 * features.chunk_samples  # of an hour's 351
    peak_kb = next(int(x.split()[1]) for x in resident.splitlines() if x.startswith("VmHWM"))
    assert peak_kb < 120_000


def test_a_process_waits_where_its_ring_is_full(noise: Noise, encoded: Encoded) -> None:
    clips = [clip("long", encoded(noise(30 * 16_000))) for _ in range(3)]
    with DecodePool(FEATURES, 1, chunks_ahead=3) as pool:
        events = pool.decode(clips)
        next(events)
        made = pool._children[0].state
        until(lambda: made()[1] >= 3)
        time.sleep(0.3)
        assert made()[1] <= 4  # three in their slots, the first of them taken
        assert [plain(event) for event in events] == expected(clips)[1:]


def test_clips_are_read_no_further_ahead_than_processes_hold(
    noise: Noise, encoded: Encoded
) -> None:
    taken = 0

    def clips() -> Iterator[EncodedClip]:
        nonlocal taken
        for _ in range(20):
            taken += 1
            yield clip("a", encoded(noise(5_000)))

    with DecodePool(FEATURES, 2, clips_ahead=2) as pool, closing(pool.decode(clips())) as events:
        next(events)
        until(lambda: taken >= 5)
        time.sleep(0.2)
        assert taken == 5  # two in each process, and the one that waits for a place
        assert len(list(events)) == 39


@pytest.mark.parametrize("taken", [0, 1, 4, 9])
def test_an_iterator_may_be_abandoned(
    pools: Callable[[int], DecodePool],
    noise: Noise,
    encoded: Encoded,
    some: list[Any],
    taken: int,
) -> None:
    pool = pools(2)
    list(pool.decode(rewound(some)))
    before = pool.process_ids, len(os.listdir("/proc/self/fd")), threading.active_count()
    long = [clip("long", encoded(noise(60 * 16_000))), *some]
    events = pool.decode(rewound(long))
    first = [plain(next(events)) for _ in range(taken)]
    events.close()
    assert first == expected(long)[:taken]
    assert (pool.process_ids, len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert given(pool, some) == expected(some)
    assert pool.process_ids == before[0]


def test_an_exception_of_the_consumers_leaves_the_pool_in_use(
    pools: Callable[[int], DecodePool], some: list[Any]
) -> None:
    for error in (KeyError, KeyboardInterrupt):
        with pytest.raises(error), closing(pools(2).decode(rewound(some))) as events:
            next(events)
            raise error
    assert given(pools(2), some) == expected(some)


def test_threads_take_turns(pools: Callable[[int], DecodePool], some: list[Any]) -> None:
    wanted = expected(some)
    answers: list[Any] = []
    contents = [(c.member, c.audio.getvalue(), c.metadata) for c in some]

    def work() -> None:
        for _ in range(3):
            own = [clip(member, content, **metadata) for member, content, metadata in contents]
            answers.append(given(pools(2), own))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [wanted] * 9


def test_one_iterator_at_a_time_in_a_thread(
    pools: Callable[[int], DecodePool], some: list[Any]
) -> None:
    with closing(pools(1).decode(rewound(some))) as events:
        next(events)
        with pytest.raises(RuntimeError, match="exhaust or close it"):
            next(pools(1).decode(rewound(some)))
    assert given(pools(1), some) == expected(some)


def test_nothing_is_left_after_close(some: list[Any]) -> None:
    files = set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    with DecodePool(FEATURES, 2) as pool:
        pids = pool.process_ids
        events = pool.decode(rewound(some))
        next(events)
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    with pytest.raises(RuntimeError, match="closed"):
        list(events)
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(pool.decode(rewound(some)))
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)  # no zombie either
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    if Path("/dev/shm").is_dir():
        assert set(os.listdir("/dev/shm")) <= files


def test_a_pool_that_is_forgotten_leaves_no_descriptors() -> None:
    gc.collect()  # what other tests left
    before = len(os.listdir("/proc/self/fd"))
    pool = DecodePool(FEATURES, 2)
    assert len(os.listdir("/proc/self/fd")) > before
    del pool
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_close_ends_an_iterator_of_another_thread(some: list[Any]) -> None:
    """It raises: an end would look like that of the shard."""
    events_before = len(expected(some))
    closed, found, errors = threading.Event(), [], []

    def clips() -> Iterator[Any]:
        yield from rewound(some)
        closed.wait(20)
        yield from rewound(some)

    def work() -> None:
        try:
            for event in pool.decode(clips()):
                found.append(event)
        except RuntimeError as error:
            errors.append(str(error))

    with DecodePool(FEATURES, 1) as pool:
        thread = threading.Thread(target=work)
        thread.start()
        until(lambda: len(found) == events_before)
        closer = threading.Thread(target=pool.close)
        closer.start()
        until(lambda: pool._closed)
        closed.set()
        thread.join(20)
        closer.join(20)
    assert errors == ["the decode pool is closed"]


def test_a_pool_that_nobody_has_ends_its_processes(some: list[Any]) -> None:
    pool = DecodePool(FEATURES, 1)
    list(pool.decode(rewound(some)))
    (pid,) = pool.process_ids
    del pool
    until(lambda: not Path(f"/proc/{pid}").exists())


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize("last", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_their_owner(last: signal.Signals) -> None:
    """Those that wait for room, for a clip, and those that hang in a decoder."""
    code = f"""
        import io, os, signal, sys, time
        sys.path[:] = {sys.path!r}
        from student.feature_spec import FeatureSpec
        from transforms.decode_pool import DecodePool
        from transforms.records import EncodedClip
        pool = DecodePool(FeatureSpec(), 3)
        def clips():
            for word in (b"no......", b"hang....", b"no......"):
                yield EncodedClip("a", io.BytesIO(word), 8, "x", {{}})
        events = pool.decode(clips())
        next(events)
        print(*pool.process_ids, flush=True)
        while pool._children[1].state()[0] != 1:
            time.sleep(0.01)
        os.kill(os.getpid(), {int(last)})
        next(events)
    """
    owner = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    pids = [int(pid) for pid in owner.stdout.split()]
    assert len(pids) == 3, owner.stderr
    assert owner.returncode == -last
    until(lambda: all(gone(pid) for pid in pids))


@pytest.mark.parametrize(
    "numbers",
    [{"processes": 0}, {"clips_ahead": 0}, {"chunks_ahead": 0}, {"clip_timeout_s": 0.0}],
)
def test_numbers_that_cannot_be_are_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(numbers))}.* 0"):
        DecodePool(FEATURES, **({"processes": 1} | numbers))
