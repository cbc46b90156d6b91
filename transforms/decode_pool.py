"""Decodes in processes: beyond one Python's GIL, and out of reach of a decoder that crashes.

A pool owns processes that load this module and the decoders, nothing else. What a process and
its owner share lies in anonymous memory files, which end with the last of the two:

- *places*, where the owner puts encoded clips; a clip that lies in a file of its own travels as
  that file's descriptor;
- *slots*, where the process puts decoded chunks. It waits when all are full, so that a recording
  of any length takes no more memory than these.

A socket carries the words, a pickled tuple each. To the process: `("clip", number, place, ...)`,
`("room", slot)`, `("drop",)` for all clips so far. From it: `(number, chunk, end, fault)`, each of
the three or None. That it ends is how either side notices the other's death.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import logging
import mmap
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from student.feature_spec import FeatureSpec
from transforms.decode import DEFAULT_LIMITS, Limits, take_decode_s
from transforms.decode_clip import decode_clip, undecoded_end, unreadable_end
from transforms.readahead import read_ahead
from transforms.records import Chunk, ClipEnd, ClipError, EncodedClip, UnreadableClip

logger = logging.getLogger(__name__)

_IN_MEMORY_BYTES = 32 << 20  # a larger clip travels as a file, made for it if need be
_KEPT_BYTES = 4 << 20  # a place that held a larger clip gives its memory back
_BLOCK_BYTES = 1 << 20
_TRIES = 2  # what ends the decoder at the same place a second time is no accident
_START_S = 120.0  # for a process to begin its first clip, on the slowest disk
_STARTS = 3  # in a row that come to nothing before the pool gives up
_LOOK_S = 1.0  # how often a silent process is looked at
_END_S = 5.0  # for a killed process to be gone
_HEADER_BYTES = mmap.PAGESIZE
_FACTS = ("codec", "sample_rate", "channels", "duration_s", "peak_dbfs", "rms_dbfs")
_SPENT = ("read", "decode", "resample")
_PartOf = tuple[float | None, float | None]  # start_s, end_s
_BEGUN, _PROGRESS = 0, 1  # header: number of the clip under way, -1 for none; chunks made so far

# The process is no child of `multiprocessing`, which would import the owner's main module in it:
# Beam's worker, or a script that has no guard.
_PYTHON = sys.executable  # as it was before anybody changed it for processes of his own
_START = (
    "import json, sys; given = json.loads(sys.argv[1]); sys.path[:] = given.pop('path'); "
    "from transforms.decode_pool import _serve; _serve(**given)"
)


class DecodePool:
    """Processes that decode clips, for one iterator at a time.

    The processes start at once and work for every `decode` until `close`; use the pool as a
    context manager. They end with their owner, whatever ends it.

    Args:
        features: of the student, for its sample rate and the length of a chunk.
        processes: how many.
        hop_samples: of `cut_chunks`.
        clips_ahead: clips that each process may hold, decoded or not.
        chunks_ahead: decoded chunks that each process may hold, 4 bytes a sample. With the
            defaults and AST's chunks that is 2.6 MB a process.
        clip_timeout_s: a clip is given up when no chunk of it came for so long.
        limits: of each clip, which the process itself keeps to.

    Raises:
        ValueError: a number is below 1, or the time-out not above 0.
        OSError: a process cannot be started.
    """

    def __init__(
        self,
        features: FeatureSpec,
        processes: int,
        *,
        hop_samples: int | None = None,
        clips_ahead: int = 4,
        chunks_ahead: int = 4,
        clip_timeout_s: float = 300.0,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        if min(processes, clips_ahead, chunks_ahead) < 1 or not clip_timeout_s > 0:
            raise ValueError(
                f"processes is {processes}, clips_ahead {clips_ahead}, chunks_ahead {chunks_ahead}, "
                f"clip_timeout_s {clip_timeout_s}; expected at least 1 each, and a time above 0"
            )
        self._clip_timeout_s = clip_timeout_s
        self._most_clips = processes * clips_ahead
        self._numbers = itertools.count()
        self._turn = threading.Lock()  # held while an iterator is under way
        self._turn_of: int | None = None  # its thread
        # Guards what follows, the children's clips and places, and what is said to a child.
        self._changed = threading.Condition()
        self._closed = False
        self._spent_s = dict.fromkeys(_SPENT, 0.0)
        self._writing = False  # into a place, which must be neither closed nor given away
        self._children: list[_Child] = []
        self._end = weakref.finalize(self, _end_all, self._children, os.getpid())
        for _ in range(processes):
            self._children.append(_Child(features, limits, hop_samples, clips_ahead, chunks_ahead))

    @property
    def process_ids(self) -> list[int]:
        """The process ids as they are now; a process that ended is replaced by another."""
        return [child.process.pid for child in self._children]

    def decode(self, clips: Iterable[EncodedClip | UnreadableClip]) -> Iterator[Chunk | ClipEnd]:
        """Yields what `decode_clips` yields: each clip's chunks, then its `ClipEnd`, in order.

        A thread reads `clips` ahead. Chunks are copied out of the shared memory (0.05 ms for
        10 s), so they may be kept for as long as one likes: batches, queues and threads need not
        tell anyone when they are done with one.

        A clip that ends the process that decodes it, twice at the same place, has the error
        "Crashed", one that is decoded no further "TimedOut", both of stage "decode". Other clips
        are not touched by it, nor is a clip whose process is killed by accident.

        One iterator at a time: in another thread, a second one waits until the first has ended
        or was closed. It may be closed at any point, and the pool be used again.

        Raises:
            RuntimeError: the pool is closed; an iterator of this thread is still under way; or
                the processes cannot run here, for they end before they begin a clip.
            Exception: what reading or decoding raises and is no `ClipError`, as it is raised.
        """
        self._take_turn()
        stop = threading.Event()
        # No more than fit into the places wait in its queue; the places are what bounds it.
        ahead = read_ahead(self._feed(clips, stop), self._most_clips)
        try:
            for sent in ahead:
                if isinstance(sent, ClipEnd):
                    yield sent
                else:
                    yield from self._events(sent)
        finally:
            with self._changed:
                stop.set()
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._writing)
            ahead.close()  # type: ignore[attr-defined]  # a generator
            with self._changed:
                for child in self._children:
                    child.drop()
            self._turn_of = None
            self._turn.release()

    def take_decode_s(self) -> dict[str, float]:
        """Seconds that all processes took for the clips that have ended since the last call.

        As `decode.take_decode_s` has them of a thread: "read", "decode", "resample".
        """
        with self._changed:
            taken, self._spent_s = self._spent_s, dict.fromkeys(_SPENT, 0.0)
        return taken

    def close(self) -> None:
        """Ends the processes and waits until they have. An iterator under way raises."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._writing)
        self._end()
        # The descriptors are closed once no other thread can be reading from them.
        own = self._turn_of == threading.get_ident()
        if own or self._turn.acquire(timeout=_END_S):
            with self._changed:
                for child in self._children:
                    child.close()
            if not own:
                self._turn.release()

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_turn(self) -> None:
        if not self._turn.acquire(blocking=False):
            if self._turn_of == threading.get_ident():
                raise RuntimeError(
                    "another iterator of this pool is under way in this thread, which would wait for "
                    "itself: exhaust or close it before the next"
                )
            self._turn.acquire()
        self._turn_of = threading.get_ident()
        try:
            self._check_open()
        except RuntimeError:
            self._turn_of = None
            self._turn.release()
            raise

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the decode pool is closed")

    def _feed(
        self, clips: Iterable[EncodedClip | UnreadableClip], stop: threading.Event
    ) -> Iterator[_Sent | ClipEnd]:
        """Gives each clip to the child with the fewest; yields it once it is given."""
        for clip in clips:
            if isinstance(clip, UnreadableClip):
                yield unreadable_end(clip)
                continue
            with self._changed:
                self._changed.wait_for(
                    lambda: stop.is_set() or self._closed or any(c.places for c in self._children)
                )
                if stop.is_set():
                    return
                self._check_open()
                child = min(
                    (child for child in self._children if child.places), key=lambda c: len(c.clips)
                )
                place = child.places.pop()
                self._writing = True
            try:
                file = _own_file(clip)
                if file is None:
                    _write(clip.audio, place)
                sent = _Sent(
                    next(self._numbers),
                    child,
                    undecoded_end(clip),
                    place,
                    file,
                )
                with self._changed:
                    child.clips.append(sent)
                    child.give(sent)
            finally:
                with self._changed:
                    self._writing = False
                    self._changed.notify_all()
            yield sent

    def _events(self, sent: _Sent) -> Iterator[Chunk | ClipEnd]:
        child = sent.child
        while True:
            said = self._receive(sent)
            if said is None:
                error = self._replace(sent)
                if error is None:
                    continue
                end = dataclasses.replace(sent.end, error=error)
            else:
                chunk, known, fault = said
                if chunk is not None:
                    slot, start_s, end_s, samples = chunk
                    waveform = child.slots[slot, :samples].copy()
                    sent.given, sent.deaths = sent.given + 1, 0
                    with self._changed:
                        child.say("room", slot)
                    yield Chunk(start_s, end_s, waveform)
                if known is None and fault is None:
                    continue
                with self._changed:
                    self._check_open()
                    child.finish(sent)
                    self._changed.notify_all()
                if fault is not None:
                    raise _as_raised(*fault)
                facts, spent_s = known
                end = _with_facts(sent.end, facts)
                with self._changed:
                    for stage in _SPENT:
                        self._spent_s[stage] += spent_s[stage]
            yield end
            return

    def _receive(self, sent: _Sent) -> tuple[Any, Any, Any] | None:
        """(chunk, end, fault) that the child says of a clip; None where it died or hangs."""
        child = sent.child
        seen, since = child.state(), time.monotonic()
        while True:
            self._check_open()
            now = child.state()
            if now != seen:
                seen, since = now, time.monotonic()
            limit_s = self._clip_timeout_s if now[_BEGUN] == sent.number else _START_S
            left_s = since + limit_s - time.monotonic()
            if left_s <= 0:
                child.hangs = True
                return None
            if not child.poller.poll(1_000 * min(left_s, _LOOK_S)):
                continue
            try:
                number, *said = pickle.loads(child.line.recv_bytes())
            except (EOFError, OSError):
                self._check_open()
                return None
            child.vain_starts = 0
            if number == sent.number:  # else of a clip that was dropped
                return said[0], said[1], said[2]

    def _replace(self, sent: _Sent) -> ClipError | None:
        """Puts another process in the place of one that died or hangs over a clip.

        Gives the clip's error, or None where it is to be decoded once more.

        Raises:
            RuntimeError: no process begins a clip.
        """
        child, error = sent.child, None
        begun, hangs = child.state()[_BEGUN] == sent.number, child.hangs
        ending = child.end()
        if not begun:
            child.vain_starts += 1
            if child.vain_starts >= _STARTS:
                how = f"did not begin within {_START_S:g} s" if hangs else f"ended with {ending}"
                raise RuntimeError(
                    f"a decoding process {how} before it began a clip, {_STARTS} times in a row; what "
                    "it printed says why. It needs the same packages as this process, and memory"
                )
        elif hangs:
            error = ClipError(
                "decode",
                "TimedOut",
                f"the decoder made no progress for {self._clip_timeout_s:g} s",
            )
        else:
            sent.deaths += 1
            if sent.deaths == _TRIES:
                error = ClipError("decode", "Crashed", f"the decoder was ended by {ending}")
        logger.warning(
            "a decoding process %s at %r; %s",
            "hangs" if hangs else f"was ended by {ending}",
            sent.end.member,
            "another takes its place" if error is None else "the clip is given up",
        )
        with self._changed:
            self._check_open()
            if error is not None:
                child.finish(sent)
                self._changed.notify_all()
            child.start()
            for waiting in child.clips:
                child.give(waiting)
        return error


@dataclasses.dataclass(eq=False)
class _Sent:
    """A clip that was given to a child, with what it takes to give it again."""

    number: int
    child: _Child
    end: ClipEnd  # without facts yet
    place: int
    file: int | None  # the clip's own, instead of the place
    given: int = 0  # chunks handed out, which a second try leaves out
    deaths: int = 0  # of processes since its last chunk

    def close(self) -> None:
        """Gives back what holds the encoded clip."""
        if self.file is not None:
            os.close(self.file)
        elif self.end.size_bytes > _KEPT_BYTES:
            os.ftruncate(self.place, 0)


class _Child:
    """A process, its shared memory, and the clips it has."""

    def __init__(
        self,
        features: FeatureSpec,
        limits: Limits,
        hop_samples: int | None,
        places: int,
        slots: int,
    ) -> None:
        self._features = features
        self._limits = limits
        self._hop_samples = hop_samples
        self._all_places = [_memory_file() for _ in range(places)]
        self.places = list(self._all_places)  # those that are free
        self.clips: deque[_Sent] = deque()  # in the order in which it decodes them
        self._shared = _memory_file()
        os.ftruncate(self._shared, _HEADER_BYTES + 4 * slots * features.chunk_samples)
        self._header, self.slots = _views(self._shared, features.chunk_samples)
        self._files = [self._shared, *self._all_places]
        self._close_files = weakref.finalize(self, _close_all, self._files)
        self._close_files.atexit = False  # a thread may still be writing to one
        self.vain_starts = 0
        self.start()

    def start(self) -> None:
        """Starts the process, the first or another; none is running."""
        self._header[:] = -1, 0
        self.hangs = False
        ours, theirs = Pipe()
        given = {
            "path": [entry for entry in sys.path if isinstance(entry, str)],
            "line": theirs.fileno(),
            "shared": self._shared,
            "features": dataclasses.asdict(self._features),
            "limits": dataclasses.asdict(self._limits),
            "hop_samples": self._hop_samples,
        }
        with contextlib.closing(theirs):
            self.process = subprocess.Popen(
                [_PYTHON, "-c", _START, json.dumps(given)],
                pass_fds=(theirs.fileno(), *self._files),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # numpy's BLAS, which nothing here uses, would start a thread for every core.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                # Control-C goes to the owner, whose end is then the process's.
                start_new_session=True,
            )
        self.line = ours
        self.poller = select.poll()
        self.poller.register(ours.fileno(), select.POLLIN)

    def state(self) -> tuple[int, int]:
        """(number of the clip under way or -1, chunks made)."""
        return int(self._header[_BEGUN]), int(self._header[_PROGRESS])

    def say(self, *words: Any) -> None:
        """Says it, unless the process is gone; that is noticed where its answer is missing."""
        with contextlib.suppress(OSError):
            self.line.send_bytes(pickle.dumps(words, pickle.HIGHEST_PROTOCOL))

    def give(self, sent: _Sent) -> None:
        by_file = sent.file is not None
        part = sent.end.start_s, sent.end.end_s
        self.say("clip", sent.number, sent.place, sent.end.size_bytes, part, sent.given, by_file)
        if sent.file is not None:
            with contextlib.suppress(OSError), _socket(self.line) as line:
                socket.send_fds(line, [b"f"], [sent.file])

    def finish(self, sent: _Sent) -> None:
        """Takes the first clip off, and its place back."""
        assert self.clips[0] is sent, "a process has answered out of order"
        self.clips.popleft()
        sent.close()
        self.places.append(sent.place)

    def drop(self) -> None:
        """Takes all clips off."""
        for sent in self.clips:
            sent.close()
        if self.clips:
            self.say("drop")
        self.clips.clear()
        self.places = list(self._all_places)

    def end(self) -> str:
        """Kills the process if it runs; says what ended it: a signal's name or its exit code."""
        if self.hangs or not _gone(self.process, _END_S):
            self.process.kill()
        code = self.process.wait()
        self.line.close()
        if code >= 0:
            return f"exit code {code}"
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"

    def close(self) -> None:
        """Closes what is shared with a process that is gone."""
        self.drop()
        self.line.close()
        self._close_files()
        self.places, self._all_places = [], []
        # The last that hold the memory, and with it a descriptor.
        self._header, self.slots = np.full(2, -1), np.zeros((0, 0), np.float32)


def _end_all(children: list[_Child], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the owner, whose the processes are not
        return
    for child in children:
        child.process.kill()
    for child in children:
        child.process.wait()


def _close_all(files: list[int]) -> None:
    for file in files:
        os.close(file)


def _gone(process: subprocess.Popen[bytes], within_s: float) -> bool:
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _own_file(clip: EncodedClip) -> int | None:
    """A descriptor of the file in which a clip lies; one too large for a place is written to one."""
    small = clip.size_bytes <= _IN_MEMORY_BYTES
    if not (small and isinstance(clip.audio, tempfile.SpooledTemporaryFile)):
        # (whose `fileno` would write to disk what is in memory)
        try:
            file = os.dup(clip.audio.fileno())
        except (AttributeError, OSError):  # in memory
            pass
        else:
            # What unpacks as it reads has the descriptor of what is packed, of another size.
            if os.fstat(file).st_size == clip.size_bytes:
                return file
            os.close(file)
    if small:
        return None
    with tempfile.TemporaryFile() as copy:
        _write(clip.audio, copy.fileno())
        return os.dup(copy.fileno())


def _write(audio: BinaryIO, file: int) -> None:
    offset = 0
    while block := audio.read(_BLOCK_BYTES):
        view = memoryview(block)
        while view:
            written = os.pwrite(file, view, offset)
            view, offset = view[written:], offset + written


def _memory_file() -> int:
    """A file without a name, in memory where the system has such.

    Not in /dev/shm: a container has 64 MB of it as a rule, and memory mapped beyond its end is
    no error but a signal that ends the process.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create("earmark-decode")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _views(shared: int, chunk_samples: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(header int64 [2], slots float32 [slots, chunk_samples]) of shared memory."""
    memory = mmap.mmap(shared, 0)
    slots = np.frombuffer(memory, np.float32, offset=_HEADER_BYTES).reshape(-1, chunk_samples)
    return np.frombuffer(memory, np.int64, 2), slots


def _socket(line: Connection) -> socket.socket:
    return socket.fromfd(line.fileno(), socket.AF_UNIX, socket.SOCK_STREAM)


def _facts(end: ClipEnd) -> dict[str, Any]:
    """What the process knows of a clip, for `_with_facts`."""
    facts = {name: getattr(end, name) for name in _FACTS}
    error = end.error  # as its arguments: exceptions of more than a message do not unpickle
    return facts | {"error": error and (error.stage, error.type, error.message)}


def _with_facts(end: ClipEnd, facts: dict[str, Any]) -> ClipEnd:
    """`end` with what the process knows."""
    error = facts["error"] and ClipError(*facts["error"])
    return dataclasses.replace(end, **(facts | {"error": error}))


def _as_raised(pickled: bytes | None, text: str) -> Exception:
    """The exception of a decoding process; what it printed there is its cause."""
    error: Exception = pickle.loads(pickled) if pickled else RuntimeError("decoding failed")
    error.__cause__ = RuntimeError(f"in a decoding process:\n{text}")
    return error


# ------------------------------------------------------------- in the process


def _serve(
    line: int,
    shared: int,
    features: dict[str, Any],
    limits: dict[str, Any],
    hop_samples: int | None,
) -> None:
    """Decodes what the owner gives until the owner is gone."""
    threading.Thread(target=_end_with_owner, args=(line,), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        spec, limited = FeatureSpec(**features), Limits(**limits)
        _Decoding(Connection(line), shared, spec, limited, hop_samples).run()


def _end_with_owner(line: int) -> None:
    """Ends the process although a decoder is at work or hangs."""
    hung_up = select.poll()
    hung_up.register(line, 0)
    hung_up.poll()
    os._exit(0)


class _Decoding:
    """The process's side: clips it has been given, slots that are free."""

    def __init__(
        self,
        line: Connection,
        shared: int,
        features: FeatureSpec,
        limits: Limits,
        hop_samples: int | None,
    ) -> None:
        self._line = line
        self._incoming = select.poll()
        self._incoming.register(line.fileno(), select.POLLIN)
        self._header, self._slots = _views(shared, features.chunk_samples)
        self._features = features
        self._limits = limits
        self._hop_samples = hop_samples
        self._clips: deque[tuple[int, BinaryIO | int, int, _PartOf, int]] = deque()
        self._drop()

    def run(self) -> None:
        while True:
            while not self._clips or self._incoming.poll(0):
                self._take()
            given = self._clips.popleft()
            self._dropped = False
            self._header[_BEGUN] = given[0]
            self._decode(*given)
            self._header[_BEGUN] = -1

    def _take(self) -> None:
        """Hears one word of the owner's, and waits for it."""
        kind, *words = pickle.loads(self._line.recv_bytes())
        if kind == "room":
            self._free.append(words[0])
        elif kind == "drop":
            self._drop()
        else:
            number, source, size, part, skip, by_file = words
            if by_file:
                with _socket(self._line) as line:
                    source = open(socket.recv_fds(line, 1, 1)[1][0], "rb")  # noqa: SIM115
            self._clips.append((number, source, size, part, skip))

    def _drop(self) -> None:
        for _, source, *_ in self._clips:
            if not isinstance(source, int):
                source.close()
        self._clips.clear()
        self._free = deque(range(len(self._slots)))
        self._dropped = True

    def _decode(
        self, number: int, source: BinaryIO | int, size: int, part: _PartOf, skip: int
    ) -> None:
        """Decodes a clip, without its first `skip` chunks.

        A chunk is told of when the next one is there or the clip ends: a short clip is one word.
        """
        chunk = end = None
        try:
            with contextlib.closing(_opened(source, size)) as audio:
                clip = EncodedClip("", audio, size, "", {}, *part)
                for event in decode_clip(clip, self._features, self._limits, self._hop_samples):
                    if isinstance(event, ClipEnd):
                        end = _facts(event), take_decode_s()
                    elif skip:
                        skip -= 1
                        self._header[_PROGRESS] += 1
                    else:
                        if chunk is not None:
                            self._say(number, chunk, None, None)
                        slot = self._room()
                        if slot is None:
                            return
                        samples = len(event.waveform)
                        self._slots[slot, :samples] = event.waveform
                        self._header[_PROGRESS] += 1
                        chunk = slot, event.start_s, event.end_s, samples
        except Exception as error:  # raised again by the owner
            self._say(number, chunk, None, (_pickled(error), traceback.format_exc()))
        else:
            self._say(number, chunk, end, None)

    def _room(self) -> int | None:
        """A free slot, waited for; None where the clip is wanted no more."""
        while self._incoming.poll(0) or not (self._free or self._dropped):
            self._take()
        return None if self._dropped else self._free.popleft()

    def _say(self, *words: Any) -> None:
        self._line.send_bytes(pickle.dumps(words, pickle.HIGHEST_PROTOCOL))


def _opened(source: BinaryIO | int, size: int) -> BinaryIO:
    """A clip, from its start, out of a place or its own file."""
    if isinstance(source, int):
        with open(source, "rb", closefd=False) as place:
            place.seek(0)
            return io.BytesIO(place.read(size))
    source.seek(0)
    return source


def _pickled(error: Exception) -> bytes | None:
    """`error`, if it is one that can be unpickled."""
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
    except Exception:  # of any class's own making; the owner then raises its traceback as text
        return None
    return content
