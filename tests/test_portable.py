"""The whole job on Beam's portable runner, by workers that have only the built wheel."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from apache_beam.options.pipeline_options import PipelineOptions, PortableOptions
from apache_beam.transforms.environments import Environment
from click.testing import CliRunner

from pipeline.cli import annotate, cli
from pipeline.options import split_beam_options

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = re.findall(
    r"```console\n\$ (.*?)\n```", (ROOT / "docs" / "runners.md").read_text("utf-8"), re.DOTALL
)
WAIT_S = 120  # for what takes a few seconds on a machine that has nothing else to do


@pytest.fixture(scope="module")
def environments(tmp_path_factory, source):
    """Two environments with all dependencies: `wheel` has the package, `bare` has not.

    The dependencies are those of this environment, lent through a .pth file. The .pth
    files among them are not read, so that an editable install of the checkout stays behind.
    """
    folder = tmp_path_factory.mktemp("portable")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", folder, source],
        check=True,
    )
    for name in ("wheel", "bare"):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / name], check=True)
        python = folder / name / "bin" / "python"
        site = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        lent = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        Path(site.stdout.strip(), "lent.pth").write_text("\n".join(lent) + "\n")
    wheel = next(folder.glob("*.whl"))
    subprocess.run(
        [*pip, "--python", folder / "wheel" / "bin" / "python", "install", "--no-index", "--no-deps", wheel],
        check=True,
    )  # fmt: skip
    return {name: folder / name / "bin" for name in ("wheel", "bare")}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A working directory outside the repository."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def start(environments, elsewhere):
    """Starts a service of Beam from an environment, as docs/runners.md does; gives its port."""
    with contextlib.ExitStack() as running:

        def begin(environment, command, **variables):
            port = free_port()
            log = elsewhere / f"{port}.log"
            service = subprocess.Popen(
                [*shlex.split(command)[:-1], str(port)],
                cwd=elsewhere, env=variables_of(environments[environment]) | variables,
                stdout=log.open("wb"), stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            running.callback(stop, service)
            wait_for(port, service, log)
            return port

        yield begin


@pytest.fixture(scope="module")
def job_service(start):
    (command,) = (c for c in COMMANDS if "local_job_service_main" in c)
    return start("wheel", command)


@pytest.fixture(scope="module")
def start_pool(start):
    (command,) = (c for c in COMMANDS if "worker_pool_main" in c)
    return lambda environment, **variables: start(environment, command, **variables)


@pytest.fixture(scope="module")
def pool(start_pool):
    return start_pool("wheel")


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_tar, encoded, noise):
    """Two tars of four clips, one of which is broken."""
    folder = tmp_path_factory.mktemp("shards")
    clips = [encoded(noise(30_000, seed), format="flac") for seed in range(3)]
    make_tar(folder / "a.tar", [("one.flac", clips[0]), ("broken.flac", b"fLaC, and no more")])
    make_tar(folder / "b.tar", [("two.flac", clips[1]), ("three.flac", clips[2])])
    return folder


@pytest.fixture(scope="module")
def run(environments, elsewhere):
    """Runs `earmark` of the wheel's environment, elsewhere."""

    def go(*arguments, **variables):
        return subprocess.run(
            [environments["wheel"] / "earmark", *map(str, arguments)],
            cwd=elsewhere, env=variables_of(environments["wheel"]) | variables,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=WAIT_S, check=False,
        )  # fmt: skip

    return go


def test_only_the_wheel_is_there(environments, elsewhere):
    code = (
        "import json, importlib, importlib.util as util; print(json.dumps([util.find_spec(name) and "
        "util.find_spec(name).origin for name in ('pipeline', 'student', 'training', 'transforms')]))"
    )
    for name, bin_folder in environments.items():
        found = subprocess.run(
            [bin_folder / "python", "-c", code],
            cwd=elsewhere, env=variables_of(bin_folder), capture_output=True, text=True, check=True,
        )  # fmt: skip
        for place in json.loads(found.stdout):
            if name == "bare":
                assert place is None
            else:
                assert bin_folder.parent in Path(place).parents


def test_the_job_gives_the_same_rows_there(
    run, job_service, pool, shards, tiny_checkpoint, tmp_path
):
    there, here = tmp_path / "there", tmp_path / "here"
    done = run(*portable(shards, there, job_service, pool), "--checkpoint", tiny_checkpoint)
    assert done.returncode == 0, done.stdout
    assert "The output holds 4 clips, 3 scored and 1 failed." in done.stdout
    arguments = ["annotate", shards, "--output", here, "--checkpoint", tiny_checkpoint]
    local = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert local.exit_code == 0, local.output
    assert sorted(file.name for file in (there / "clips").iterdir()) == sorted(
        file.name for file in (here / "clips").iterdir()
    )
    rows, expected = rows_of(there), rows_of(here)
    assert [row["clip_id"] for row in rows] == [row["clip_id"] for row in expected]
    assert [row["error"] and row["error"]["type"] for row in rows].count("InvalidDataError") == 1
    for row, other in zip(rows, expected, strict=True):
        assert {k: v for k, v in row.items() if k not in ("scores", "tags")} == {
            k: v for k, v in other.items() if k not in ("scores", "tags")
        }
        np.testing.assert_allclose(
            np.array(row["scores"], float), np.array(other["scores"], float), atol=1e-5
        )


def test_a_worker_without_the_package_says_so(
    run, job_service, start_pool, shards, tiny_checkpoint, tmp_path
):
    command = portable(shards, tmp_path / "tags", job_service, start_pool("bare"))
    done = run(*command, "--checkpoint", tiny_checkpoint)
    assert done.returncode == 1
    assert (
        "ModuleNotFoundError: No module named 'pipeline'; the worker lacks earmark" in done.stdout
    )
    assert "Traceback" not in done.stdout.splitlines()[-2]
    assert not list((tmp_path / "tags").rglob("clips/*.parquet"))


def test_a_worker_with_another_checkpoint_says_so(
    run, job_service, start_pool, shards, make_checkpoint, tmp_path
):
    """The worker's cache of the hub holds the same name with other weights."""
    for cache, names in (("launcher", ["dog", "cat"]), ("worker", ["dog", "owl"])):
        model = tmp_path / cache / "hub" / "models--someone--model"
        (model / "refs").mkdir(parents=True)
        (model / "refs" / "main").write_text("0123abc")
        make_checkpoint(model / "snapshots" / "0123abc", names)
    pool = start_pool("wheel", HF_HOME=str(tmp_path / "worker"))
    done = run(
        *portable(shards, tmp_path / "tags", job_service, pool),
        "--checkpoint", "someone/model", HF_HOME=str(tmp_path / "launcher"),
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search(
        r"checkpoint 'someone/model' has config \w+\.\.\. on this worker, but the run was started with",
        done.stdout,
    ), done.stdout
    assert not list((tmp_path / "tags").rglob("clips/*.parquet"))


def test_flink_s_launcher_starts_the_jar_and_submits_to_it(
    run, environments, pool, shards, tiny_checkpoint, tmp_path
):
    """With Beam's own job service where Flink's jar would be: this is not Flink."""
    jar, launcher = tmp_path / "job-server.jar", tmp_path / "java"
    jar.touch()
    launcher.write_text(
        "#!/bin/sh\n"
        f'echo "$@" > {tmp_path}/arguments\n'
        'while [ "$1" != --job-port ]; do shift; done\n'
        f"exec {environments['wheel']}/python -m "
        'apache_beam.runners.portability.local_job_service_main --port "$2"\n'
    )
    launcher.chmod(0o755)
    done = run(
        "annotate", shards, "--output", tmp_path / "tags", "--checkpoint", tiny_checkpoint,
        "--runner", "FlinkRunner", "--flink_job_server_jar", jar,
        "--job_server_java_launcher", launcher,
        "--environment_type", "EXTERNAL", "--environment_config", f"localhost:{pool}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "The output holds 4 clips, 3 scored and 1 failed." in done.stdout
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[:2] == ["-jar", str(jar)] and "--flink-master" in arguments


@pytest.mark.parametrize(
    "command",
    [c for c in COMMANDS if c.startswith("earmark ")],
    ids=lambda c: "-".join(re.findall(r"--(?:runner|environment_type) (\w+)", c)),
)
def test_the_commands_of_the_docs_are_what_beam_takes(command):
    arguments = shlex.split(command)[2:]
    context = annotate.make_context("annotate", list(arguments))  # earmark's options are taken
    own = [name for parameter in annotate.params for name in parameter.opts]
    inputs, options = split_beam_options(context.params["inputs"], own)
    assert len(inputs) == 1
    parsed = PipelineOptions(list(options))
    assert not set(parsed.get_all_options(drop_default=True)) - {
        option.lstrip("-") for option in options if option.startswith("--")
    }
    kind = parsed.view_as(PortableOptions).environment_type
    environment = Environment.from_options(parsed.view_as(PortableOptions))
    assert kind.lower() in type(environment).__name__.lower()


def portable(shards, output, job_service, pool):
    """The command of docs/runners.md, with these ports and folders."""
    (command,) = (c for c in COMMANDS if c.startswith("earmark annotate demo/shards"))
    places = {
        "demo/shards": shards,
        "tags-portable": output,
        "localhost:8099": f"localhost:{job_service}",
        "localhost:50000": f"localhost:{pool}",
    }
    return [places.get(argument, argument) for argument in shlex.split(command)[1:]]


def rows_of(output):
    table = pq.read_table(output / "clips").sort_by("clip_id")
    return table.to_pylist()


def variables_of(bin_folder):
    """This environment, with another Python first in PATH and nothing that leads to the checkout."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    path = f"{bin_folder}{os.pathsep}{kept['PATH']}"
    return kept | {"PATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def wait_for(port, service, log):
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        assert service.poll() is None, log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("localhost", port), 1):
            return
        time.sleep(0.1)
    raise AssertionError(f"nothing listens at {port}: {log.read_text()}")


def stop(service):
    """Ends a service and the workers that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(service.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        service.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(service.pid, signal.SIGKILL)
    service.wait()
