"""Does to runs what machines do, again and again, and recounts what is left.

    python bench/chaos.py --kills 200 --record

Kills (SIGKILL at a random moment of the run's whole length, then the same command again), two
processes on one output, a full disk, a disk that becomes read-only, inputs that disappear in the middle, a clock
that jumps, too little memory, Ctrl-C, kills of `earmark retry`. After each the output is finished by an undisturbed
run; then `earmark verify --audio` has to pass, and the rows have to equal those of an undisturbed
run, value for value. Prints JSON; exits with 1 if anything is missing, doubled, different or hangs.

Runs are forked from a process that has imported everything, so that one takes a second and not six,
and most kills meet work and not imports. A full and a read-only disk are a tmpfs, which takes root; else the
former is a limit on a file's size, and the latter is left out. The clock is Python's `time.time` and
`time.monotonic` in the run's process, which give times up to a day off: the kernel's does not jump.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
# As earmark's own `main` has it, and one thread: runs are short and there are many. Read when torch is loaded.
os.environ.update(OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="1")

import apache_beam.runners.portability.fn_api_runner.fn_runner  # noqa: F401 - for the forks

import pipeline.display
import pipeline.rehearse
import pipeline.retry
import pipeline.run  # noqa: F401
from bench.kill import table_of, write_shards
from bench.record import append_results, machine, table
from pipeline.cli import cli
from pipeline.verify import verify_output

PATIENCE_S = 120.0  # a run that takes longer hangs


class Chaos:
    """A folder with inputs, what an undisturbed run makes of them, and what went wrong so far."""

    def __init__(self, folder: Path, shards: int, clips: int, seed: int) -> None:
        self.folder, self.chance = folder, random.Random(seed)
        self.inputs = folder / "shards"
        write_shards(self.inputs, shards, clips, seed)
        broken = io.BytesIO(b"no audio")
        with tarfile.open(self.inputs / "noise-00000.tar", "a") as tar:
            info = tarfile.TarInfo("broken.wav")
            info.size = len(broken.getvalue())
            tar.addfile(info, broken)
        self.expected = folder / "undisturbed"
        started = time.monotonic()
        assert self.run(self.annotate(self.expected)) == 0, self.said()
        self.wall_s = time.monotonic() - started
        self.outputs = 0
        self.wrong: list[str] = []

    def annotate(self, output: Path) -> list[str]:
        return ["annotate", str(self.inputs), "--output", str(output), "--device", "cpu"]

    def output(self) -> Path:
        """A place for one more output."""
        self.outputs += 1
        return self.folder / f"output-{self.outputs}"

    def start(self, command: list[str], before: Callable[[], Any] = lambda: None) -> int:
        """Forks a run of `earmark`; gives its process id."""
        pid = os.fork()
        if pid:
            return pid
        code = 70
        try:
            os.setsid()
            log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            before()
            cli(command, prog_name="earmark")
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, pid: int) -> int:
        """The exit code, or minus the signal; a run that hangs is killed, and counts as wrong."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self.wrong.append(f"hangs: {self.said()}")
        return 124

    def run(self, command: list[str], before: Callable[[], Any] = lambda: None) -> int:
        return self.wait(self.start(command, before))

    def said(self) -> str:
        """What the last run printed."""
        return (self.folder / "log").read_text("utf-8", "replace")

    def expect(self, what: str, code: int, *codes: int, silent: bool = True) -> None:
        """Notes an exit code that is none of `codes`, and a traceback where nobody asked for one."""
        if code not in codes:
            self.wrong.append(f"{what}: ended with {code}: {self.said()[-600:]}")
        if silent and "Traceback" in self.said():
            self.wrong.append(f"{what}: a traceback: {self.said()[-600:]}")

    def finish(self, what: str, output: Path) -> None:
        """Goes on with an output to its end, verifies it and compares all values."""
        self.expect(what, self.run(self.annotate(output)), 0)
        self.compare(what, output, self.expected)

    def compare(self, what: str, output: Path, expected: Path) -> None:
        report = self.folder / "compared"

        def look() -> None:
            problems = verify_output(str(output), audio=True).named
            equal = table_of(output).equals(table_of(expected))
            report.write_text(json.dumps({"problems": problems, "equal": equal}))

        report.unlink(missing_ok=True)
        if self.run(["--version"], look) or not report.exists():
            self.wrong.append(f"{what}: could not be compared: {self.said()[-600:]}")
            return
        found = json.loads(report.read_text())
        if found["problems"] or not found["equal"]:
            self.wrong.append(f"{what}: {found}")
        shutil.rmtree(output, ignore_errors=True)


def kills(chaos: Chaos, number: int) -> dict[str, Any]:
    """SIGKILL at random moments of a run's length."""
    killed = completed = 0
    output = chaos.output()
    while killed < number:
        pid = chaos.start(chaos.annotate(output))
        time.sleep(chaos.chance.uniform(0, 1.1 * chaos.wall_s))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        ended = chaos.wait(pid)
        killed += ended == -signal.SIGKILL
        if ended == 0 or chaos.chance.random() < 0.3:
            chaos.finish("kill", output)
            completed += 1
            output = chaos.output()
    chaos.finish("kill", output)
    return {"kills": killed, "outputs": completed + 1}


def killed_retries(chaos: Chaos, number: int) -> dict[str, Any]:
    """SIGKILL of `earmark retry` at random moments; the failed clip fails again, with the same rows."""
    output = chaos.output()
    chaos.expect("retry", chaos.run(chaos.annotate(output)), 0)
    killed = 0
    for _ in range(number):
        pid = chaos.start(["retry", str(output), "--device", "cpu"])
        time.sleep(chaos.chance.uniform(0.05, 0.4) * chaos.wall_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        killed += chaos.wait(pid) == -signal.SIGKILL
    chaos.expect("retry", chaos.run(["retry", str(output), "--device", "cpu"]), 0)
    chaos.finish("retry", output)
    return {"kills": killed}


def two_at_once(chaos: Chaos, number: int) -> dict[str, Any]:
    """The same command twice on one output, begun at most half a run apart."""
    for _ in range(number):
        output = chaos.output()
        first = chaos.start(chaos.annotate(output))
        time.sleep(chaos.chance.uniform(0, chaos.wall_s / 2))
        second = chaos.start(chaos.annotate(output))
        chaos.expect("two at once", chaos.wait(first), 0)
        chaos.expect("two at once", chaos.wait(second), 0)
        chaos.finish("two at once", output)
    return {"pairs": number}


def interrupted(chaos: Chaos, number: int) -> dict[str, Any]:
    """Ctrl-C at random moments."""
    stopped = 0
    for _ in range(number):
        output = chaos.output()
        pid = chaos.start(chaos.annotate(output))
        time.sleep(chaos.chance.uniform(0.1, 0.9) * chaos.wall_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGINT)
        ended = chaos.wait(pid)
        chaos.expect("Ctrl-C", ended, 130, 0)
        if ended == 130 and "run the same command again" not in chaos.said():
            chaos.wrong.append(f"Ctrl-C: does not say how to go on: {chaos.said()}")
        stopped += ended == 130
        chaos.finish("Ctrl-C", output)
    return {"stopped": stopped}


def interrupted_workers(chaos: Chaos) -> dict[str, Any]:
    """Ctrl-C, once, of a run with two worker processes, which are no forks."""
    output, log = chaos.output(), chaos.folder / "log"
    command = [sys.executable, "-m", "pipeline", *chaos.annotate(output), "--devices", "2"]
    with log.open("w") as stream:
        run = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
        until = time.monotonic() + PATIENCE_S
        while not list((output / "clips").glob(".*.partial")) and time.monotonic() < until:
            time.sleep(0.02)
        os.killpg(run.pid, signal.SIGINT)
        code = run.wait(PATIENCE_S)
    chaos.expect("Ctrl-C of workers", code, 130)
    chaos.finish("Ctrl-C of workers", output)
    return {"stopped": int(code == 130)}


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A tmpfs at `folder`; gives what mounts it anew with other options.

    Raises:
        OSError: it cannot be mounted.
    """
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        folder.rmdir()
        raise OSError(done.stderr.strip())
    try:
        yield (
            lambda options: (
                subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
                and None
            )
        )  # type: ignore[func-returns-value]
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(chaos: Chaos) -> dict[str, Any]:
    """A disk that fills in the middle of a run."""
    size = sum(f.stat().st_size for f in (chaos.expected / "clips").iterdir())
    try:
        with small_disk(chaos.folder / "full", f"{max(1, size // 2_048)}k") as remount:
            output = chaos.folder / "full" / "out"
            chaos.expect("full disk", chaos.run(chaos.annotate(output)), 1)
            if "No space left" not in chaos.said():
                chaos.wrong.append(f"full disk: is not named: {chaos.said()}")
            remount("size=64m")
            chaos.finish("full disk", output)
            return {"by": "tmpfs"}
    except (OSError, FileNotFoundError) as error:
        reason = str(error)
    output = chaos.output()

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    chaos.expect("full disk", chaos.run(chaos.annotate(output), limited), 1, 2)
    chaos.finish("full disk", output)
    return {"by": f"a limit on a file's size, because no tmpfs can be mounted here ({reason})"}


def read_only_disk(chaos: Chaos) -> dict[str, Any]:
    """A disk that is read-only, at the start and from the middle of a run on."""
    try:
        with small_disk(chaos.folder / "read-only", "64m") as remount:
            output = chaos.folder / "read-only" / "out"
            remount("ro")
            chaos.expect("read-only", chaos.run(chaos.annotate(output)), 2)
            remount("rw")
            pid = chaos.start(chaos.annotate(output))
            while not list((output / "clips").glob("*.parquet")):
                time.sleep(0.002)
            # A file that is open for writing keeps a disk from becoming read-only.
            turned = False
            while not turned and not os.waitpid(pid, os.WNOHANG)[0]:
                with contextlib.suppress(subprocess.CalledProcessError):
                    remount("ro")
                    turned = True
            if turned:
                chaos.expect("read-only", chaos.wait(pid), 1)
                remount("rw")
            chaos.finish("read-only", output)
            return {"by": "tmpfs", "in_the_middle": turned}
    except (OSError, FileNotFoundError) as error:
        return {"left_out": f"no tmpfs can be mounted here ({error})"}


def lost_input(chaos: Chaos, number: int) -> dict[str, Any]:
    """Inputs that disappear while a run is at work, and come back."""
    stopped = 0
    away = chaos.folder / "away"
    for _ in range(number):
        output = chaos.output()
        pid = chaos.start(chaos.annotate(output))
        time.sleep(chaos.chance.uniform(0, chaos.wall_s))
        away.mkdir()
        gone = sorted(chaos.inputs.iterdir())[2:]
        for file in gone:
            file.rename(away / file.name)
        code = chaos.wait(pid)
        chaos.expect("lost input", code, 0, 1, 2)
        if code == 1 and ".tar" not in chaos.said():
            chaos.wrong.append(f"lost input: is not named: {chaos.said()}")
        stopped += code != 0
        for file in gone:
            (away / file.name).rename(file)
        away.rmdir()
        chaos.finish("lost input", output)
    return {"stopped": stopped}


def jumping_clock(chaos: Chaos, number: int) -> dict[str, Any]:
    """Clocks that give times up to a day off, forwards and backwards, at every look."""
    of_day, steady = time.time, time.monotonic

    def jump() -> None:
        time.time = lambda: of_day() + chaos.chance.uniform(-86_400, 86_400)
        time.monotonic = lambda: steady() + chaos.chance.uniform(0, 86_400)

    for _ in range(number):
        output = chaos.output()
        chaos.expect("clock", chaos.run(chaos.annotate(output), jump), 0, 1)
        chaos.finish("clock", output)
    return {"runs": number}


def little_memory(chaos: Chaos, number: int) -> dict[str, Any]:
    """An address space that ends somewhere in the middle of a run."""
    stopped = 0
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for _ in range(number):
        room = chaos.chance.randint(64 << 20, 900 << 20)

        def limited(most: int = pages + room) -> None:
            resource.setrlimit(resource.RLIMIT_AS, (most, most))

        output = chaos.output()
        code = chaos.run(chaos.annotate(output), limited)
        stopped += code != 0
        # C libraries abort where they get no memory: any end will do, half a file will not.
        chaos.finish("memory", output)
    return {"stopped": stopped}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--times", type=int, default=5, help="of each other fault")
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--clips", type=int, default=12, help="clips in a shard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", metavar="FAULT", help="such as sigkill")
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="earmark-chaos-") as name:
        chaos = Chaos(Path(name), args.shards, args.clips, args.seed)
        result: dict[str, Any] = {"undisturbed_wall_s": round(chaos.wall_s, 2)}
        for fault, does in (
            ("sigkill", lambda: kills(chaos, args.kills)),
            ("sigkill of retry", lambda: killed_retries(chaos, args.times)),
            ("two processes at once", lambda: two_at_once(chaos, args.times)),
            ("Ctrl-C", lambda: interrupted(chaos, args.times)),
            ("Ctrl-C of two workers", lambda: interrupted_workers(chaos)),
            ("full disk", lambda: full_disk(chaos)),
            ("read-only disk", lambda: read_only_disk(chaos)),
            ("lost inputs", lambda: lost_input(chaos, args.times)),
            ("jumping clock", lambda: jumping_clock(chaos, args.times)),
            ("little memory", lambda: little_memory(chaos, args.times)),
        ):
            if args.only and fault not in args.only:
                continue
            known, outputs, started = len(chaos.wrong), chaos.outputs, time.monotonic()
            told = does()
            result[fault] = {
                **told,
                "outputs": max(1, chaos.outputs - outputs),
                "wrong": len(chaos.wrong) - known,
                "wall_s": round(time.monotonic() - started, 1),
            }
            print(f"{fault}: {result[fault]}", file=sys.stderr, flush=True)
        result["wrong"] = chaos.wrong
    print(json.dumps(result))
    if args.record:
        about = machine()
        rows = [
            [fault, ", ".join(f"{k} {v}" for k, v in told.items() if k not in ("wrong", "wall_s")),
             told["wrong"], told["wall_s"]]
            for fault, told in result.items() if isinstance(told, dict)
        ]  # fmt: skip
        clips = args.shards * args.clips + 1
        append_results(
            "chaos",
            about,
            [
                f"`python bench/chaos.py --kills {args.kills} --times {args.times} --seed {args.seed}`, the bundled "
                f"student, {clips} clips in {args.shards} tars; an undisturbed run takes {chaos.wall_s:.1f} s. Each "
                "output was finished, verified (`--audio`) and compared value for value with an undisturbed one.",
                "",
                *table(["fault", "how often", "wrong", "s"], rows),
            ],
        )
    return 1 if chaos.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
