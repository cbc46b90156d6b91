"""Ctrl-C: nothing half is published, one sentence says how to go on, and no worker stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.interrupt import workers_end_with_us
from pipeline.verify import verify_output

ROOT = Path(__file__).parent.parent


def processes_of(group):
    """The processes of a process group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgid = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgid) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("options", [(), ("--devices", "2")], ids=str)
def test_ctrl_c_is_one_sentence_and_the_same_command_goes_on(
    tmp_path, make_tar, encoded, noise, tiny_checkpoint, options
):
    for shard in range(2):
        clip = encoded(noise(16_000, seed=shard))
        make_tar(tmp_path / f"s-{shard}.tar", [(f"{n}.wav", clip) for n in range(200)])
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "annotate",
        str(tmp_path / "s-*.tar"),
        "-o",
        str(out),
    ]
    command += ["--checkpoint", str(tiny_checkpoint), "--device", "cpu", *options]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not list((out / "clips").glob(".*.partial")):
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130, said
    assert said.splitlines()[-1] == (
        "Stopped. Finished shards are kept: run the same command again to go on."
    )
    assert "Traceback" not in said and "Error" not in said
    until = time.monotonic() + 10
    while processes_of(run.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not processes_of(run.pid)

    again = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert verify_output(str(out)).named == {}
    assert not list((out / "clips").glob(".*"))


def test_what_is_changed_while_workers_run_is_as_it_was_afterwards():
    python, handler = sys.executable, signal.getsignal(signal.SIGINT)
    with workers_end_with_us():
        assert sys.executable != python
    with pytest.raises(KeyboardInterrupt), workers_end_with_us():
        signal.raise_signal(signal.SIGINT)
    assert (sys.executable, signal.getsignal(signal.SIGINT)) == (python, handler)
