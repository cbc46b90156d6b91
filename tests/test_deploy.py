"""What of deploy/ can be checked without a cloud, a GPU and Docker, which README.md there lists."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import hcl2
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from dockerfile_parse import DockerfileParser
from google.cloud.dataflow_v1beta3 import TemplateMetadata
from google.cloud.devtools.cloudbuild_v1 import Build
from google.cloud.monitoring_v3 import AlertPolicy
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import pipeline.cli
from pipeline import __version__, dataflow, image
from transforms.meter import COUNTERS, DISTRIBUTIONS
from transforms.write import RowOptions, clips_schema

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
README = (DEPLOY / "README.md").read_text("utf-8")
DOCKERFILE = (DEPLOY / "Dockerfile").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PACKAGES = {
    name.partition(".")[0]
    for name in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"][
        "packages"
    ]
}

PIN = re.compile(r"^([a-z0-9-]+)==(\S+) \\\n    --hash=sha256:([0-9a-f]{64})$", re.MULTILINE)
CUDA = re.compile(r"torch$|triton$|nvidia-|cuda-")  # gigabytes, and of no use without a GPU

CLOUD = {"PROJECT": "my-project", "REGION": "us-central1", "BUCKET": "gs://my-bucket/earmark/"}


def load(name):
    spec = importlib.util.spec_from_file_location(f"deploy_{name}", DEPLOY / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lock():
    return {
        name: version
        for name, version, _ in PIN.findall((DEPLOY / "requirements.lock").read_text())
    }


def constraints():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


# -------------------------------------------------------------------- Dockerfile


@pytest.fixture(scope="module")
def dockerfile(tmp_path_factory):
    # A copy: the parser opens its file for writing too.
    file = tmp_path_factory.mktemp("docker") / "Dockerfile"
    file.write_text(DOCKERFILE, "utf-8")
    return DockerfileParser(str(file))


def instructions(dockerfile, kind):
    return [step["value"] for step in dockerfile.structure if step["instruction"] == kind]


def test_the_images_python_and_beam_are_those_of_the_project(dockerfile):
    beam, launcher, python = dockerfile.parent_images[:3]
    version = constraints()["apache-beam"]
    assert version == dataflow.BEAM_VERSION
    assert beam == f"apache/beam_python3.11_sdk:{version}"
    assert "python311-template-launcher" in launcher
    assert python.startswith("python:3.11-slim")
    assert "3.11" in SpecifierSet(PROJECT["requires-python"])
    assert "Python 3.11" in (ROOT / "constraints.txt").read_text("utf-8")
    assert f"selftest.py --python 3.11 --beam {version} " in DOCKERFILE


def test_the_images_labels_are_what_the_launcher_compares(dockerfile):
    versions = {"python": "3.11", "beam": constraints()["apache-beam"], "earmark": __version__}
    stated = {image.LABELS[label]: value for label, value in dockerfile.labels.items()}
    assert stated.pop("checkpoint") in ("${CHECKPOINT}", "bookbot/distil-ast-audioset")
    assert stated == versions
    if platform.python_version_tuple()[:2] == ("3", "11"):
        dataflow.refuse_other_versions("x", stated)


def test_the_image_starts_boot_offline_and_in_the_environment_that_it_was_built_with(dockerfile):
    assert instructions(dockerfile, "ENTRYPOINT") == ['["/opt/apache/beam/boot"]']
    assert dockerfile.envs["HF_HUB_OFFLINE"] == "1"
    assert dockerfile.envs["RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT"] == "1"
    assert dockerfile.envs["FLEX_TEMPLATE_PYTHON_PY_FILE"] == "/opt/earmark/template.py"
    assert "/usr/local/nvidia/lib64" in dockerfile.envs["LD_LIBRARY_PATH"]


def test_the_image_installs_by_hash_and_tests_itself_without_rights(dockerfile):
    installs = [step for step in instructions(dockerfile, "RUN") if "pip install" in step]
    for command in " && ".join(installs).split("pip install")[1:]:
        assert "--require-hashes" in command or "--no-index" in command
        assert "--no-deps" in command and "--no-cache-dir" in command
    steps = [(s["instruction"], s["value"]) for s in dockerfile.structure]
    users = [(at, value) for at, (kind, value) in enumerate(steps) if kind == "USER"]
    test = next(
        at for at, (kind, value) in enumerate(steps) if kind == "RUN" and "selftest" in value
    )
    assert [value for _, value in users] == ["earmark", "root"]
    assert users[0][0] < test < users[1][0]


def test_the_image_holds_every_package_and_the_builder_is_sent_no_more(dockerfile):
    copied = [
        source
        for value in instructions(dockerfile, "COPY")
        if "--from" not in value
        for source in value.split()[:-1]
    ]
    assert set(copied) >= PACKAGES
    assert all((ROOT / source).exists() for source in copied)
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert kept[1] == "*"
    assert {line[1:] for line in kept if line.startswith("!")} == {c.split("/")[0] for c in copied}


def test_what_is_baked_in_is_what_a_checkpoint_needs():
    from student import checkpoint

    (patterns,) = [v for k, v in vars(checkpoint).items() if k == "_HUB_FILES"]
    command = DOCKERFILE[DOCKERFILE.index("hf download") :].partition(" ; ")[0]
    assert re.findall(r"--include '?([^\s']+)", command) == list(patterns)


def test_dependencies_come_before_the_code_so_that_their_layer_is_kept():
    order = [
        "COPY deploy/requirements.lock", "RUN grep", "hf download", "COPY deploy/selftest.py", "/wheels/*.whl"
    ]  # fmt: skip
    places = [DOCKERFILE.index(step) for step in order]
    assert places == sorted(places)


# --------------------------------------------------------------------- lock file


def test_every_line_of_the_lock_is_a_pin_with_its_hash():
    text = (DEPLOY / "requirements.lock").read_text()
    rest = PIN.sub("", text).splitlines()
    assert all(not line or line.startswith("#") for line in rest)
    assert len(lock()) > 150
    assert not re.search(r"https?:|file:|--index|--find-links|@ ", text)


def test_the_lock_has_the_versions_that_the_tests_ran_with():
    known = constraints()
    assert {n: v for n, v in lock().items() if n in known} == {
        n: known[n] for n in lock() if n in known
    }
    assert lock()["torch"] == known["torch"]


def test_the_lock_is_all_that_the_image_needs_and_nothing_else():
    pins = lock()
    reached = set()
    todo = [Requirement(r) for r in load("lock").requirements()]
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        assert name in pins, f"{wanted} is not in the lock"
        assert wanted.specifier.contains(pins[name], prereleases=True), wanted
        key = (name, tuple(sorted(wanted.extras)))
        if key in reached:
            continue
        reached.add(key)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            # What torch needs for CUDA is not in the metadata of its CPU build.
            todo += needed_by(wanted)
            continue
        raise AssertionError(f"{wanted.name} is locked and not installed here: install '.[test]'")
    unreached = set(pins) - {name for name, _ in reached}
    assert all(CUDA.match(name) for name in unreached), unreached
    assert {"triton", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"} <= unreached | set(pins)


def needed_by(wanted):
    for text in importlib.metadata.requires(wanted.name) or ():
        requirement = Requirement(text)
        environment = {
            "python_version": "3.11",
            "python_full_version": "3.11.9",
            "sys_platform": "linux",
            "platform_system": "Linux",
            "platform_machine": "x86_64",
            "os_name": "posix",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
        }
        extras = wanted.extras or {""}
        if requirement.marker is None or any(
            requirement.marker.evaluate(environment | {"extra": extra}) for extra in extras
        ):
            yield requirement


def test_lock_asks_pip_without_this_machines_own_packages(monkeypatch, tmp_path):
    lock_module = load("lock")
    seen = {}

    def pip(command, env, check):
        seen.update(env=env, command=[str(part) for part in command])
        package = {
            "metadata": {"name": "A_b.C", "version": "1"},
            "download_info": {"archive_info": {"hashes": {"sha256": "0" * 64}}},
        }
        Path(command[-1]).write_text(json.dumps({"install": [package]}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://example.com")
    monkeypatch.setattr(lock_module.subprocess, "run", pip)
    text = lock_module.lock_text(lock_module.resolve(["a"], ["a==1"]))
    assert "a-b-c==1 \\\n    --hash=sha256:" + "0" * 64 in text
    assert "PIP_FIND_LINKS" not in seen["env"]
    assert seen["env"]["PIP_CONFIG_FILE"] == os.devnull
    assert seen["env"]["PIP_EXTRA_INDEX_URL"] == "https://example.com"
    assert "--dry-run" in seen["command"]


def test_lock_can_take_another_torch():
    pins = load("lock").constraints("2.13.0+cu126")
    assert [pin for pin in pins if pin.startswith("torch==")] == ["torch==2.13.0+cu126"]
    assert f"apache-beam=={dataflow.BEAM_VERSION}" in pins


# --------------------------------------------------- the image's steps, without Docker


@pytest.fixture(scope="module")
def environment():
    """A virtual environment made as the image is, but for CUDA: torch is that of the tests.

    Yields:
        its `bin` folder.
    """
    if sys.version_info[:2] != (3, 11) or (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("the lock file is for Python 3.11 on Linux x86_64")
    with tempfile.TemporaryDirectory(prefix="earmark-image-") as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        binaries = folder / "venv" / "bin"
        pins = [
            match.group() + "\n"
            for match in PIN.finditer((DEPLOY / "requirements.lock").read_text())
        ]
        (folder / "setuptools.lock").write_text(
            "".join(p for p in pins if p.startswith("setuptools=="))
        )
        (folder / "rest.lock").write_text(
            "".join(p for p in pins if not CUDA.match(p.partition("==")[0]))
        )
        install = [binaries / "pip", "install", "--quiet", "--no-compile", "--no-deps"]
        by_hash = [*install, "--require-hashes", "--no-build-isolation", "--use-pep517"]
        checked([*by_hash, "-r", folder / "setuptools.lock"])
        checked([*by_hash, "-r", folder / "rest.lock"])
        site = next((folder / "venv" / "lib").glob("python*/site-packages"))
        lend_torch(folder / "torch", site)
        source = folder / "source"
        for part in ("pyproject.toml", "setup.py", "README.md", "LICENSE", *PACKAGES):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            source.mkdir(exist_ok=True)
            copy(ROOT / part, source / part)
        wheel = [binaries / "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        checked([*wheel, "--wheel-dir", folder / "wheels", source])
        checked([*install, "--no-index", *(folder / "wheels").glob("*.whl")])
        yield binaries


def lend_torch(folder, site):
    """Makes the torch of this environment importable, and seen by pip, in another."""
    folder.mkdir()
    distribution = importlib.metadata.distribution("torch")
    tops = {
        file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")
    }
    for top in tops:
        (folder / top).symlink_to(Path(distribution.locate_file(top)))
    (site / "torch.pth").write_text(f"{folder}\n")


def checked(command, cwd="/", **kwargs):
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=280, **kwargs,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
    return done.stdout


def test_the_images_steps_give_what_passes_its_self_test(environment):
    checked([environment / "pip", "check"])
    command = [environment / "python", DEPLOY / "selftest.py", "--python", "3.11", "--beam"]
    lines = checked([*command, dataflow.BEAM_VERSION]).splitlines()
    assert [line.split()[0] for line in lines] == [
        "python", "beam", "earmark", "codecs", "device", "student"
    ]  # fmt: skip
    assert f"earmark {__version__}" in lines
    assert "codecs wav, flac, mp3, ogg" in lines
    assert "527 scores" in lines[-1]


def test_the_templates_entry_point_works_from_the_wheel(environment):
    shown = checked([environment / "python", DEPLOY / "template.py", "--metadata"])
    assert json.loads(shown) == json.loads((DEPLOY / "metadata.json").read_text())
    assert __version__ in checked([environment / "earmark", "--version"])


def test_the_self_test_refuses_what_is_not_as_expected(environment):
    def refusal(*arguments, **kwargs):
        command = [environment / "python", DEPLOY / "selftest.py", *arguments]
        done = subprocess.run(command, text=True, capture_output=True, timeout=280, **kwargs)
        assert done.returncode == 1
        return done.stderr

    assert "but 3.12 is expected" in refusal("--python", "3.12")
    assert "but 2.1.0 is expected" in refusal("--beam", "2.1.0")
    # A checkout in front of the installation is what hides a package that is missing from it.
    shadowed = refusal(cwd="/", env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "'student' comes from" in shadowed


def test_the_self_test_names_a_bad_student(tmp_path, tiny_checkpoint):
    selftest = load("selftest")
    with pytest.raises(selftest.Broken, match=r"does not load: .*neither"):
        selftest.check_student("no such", 527, gpu=False)
    with pytest.raises(selftest.Broken, match=r"shape \(1, 527\), expected \(1, 3\)"):
        selftest.check_student(str(tiny_checkpoint), 3, gpu=False)


def test_the_self_test_requires_a_gpu_where_one_is_asked_for(monkeypatch):
    import torch

    selftest = load("selftest")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert selftest.check_device(gpu=False).startswith("cpu")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(selftest.Broken, match="driver 580 or later"):
        selftest.check_device(gpu=True)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(selftest.Broken, match="CPU build"):
        selftest.check_device(gpu=True)


# ----------------------------------------------------------------- Flex Template


def test_a_worker_of_beam_starts_there_and_does_the_job(environment, tmp_path, encoded, noise):
    """The job through Beam's worker pool, each worker in the environment made from the lock file."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.wav").write_bytes(encoded(noise(8_000)))
    pool_port, job_port = free_port(), free_port()
    inside = os.environ | {"PATH": f"{environment}{os.pathsep}{os.environ['PATH']}"}
    services = [
        ["apache_beam.runners.worker.worker_pool_main", "--service_port", str(pool_port)],
        ["apache_beam.runners.portability.local_job_service_main", "--port", str(job_port)],
    ]
    running = [
        subprocess.Popen(
            [environment / "python", "-m", *service], cwd=tmp_path, env=inside,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )
        for service in services
    ]  # fmt: skip
    try:
        for port in (pool_port, job_port):
            wait_for_port(port)
        done = subprocess.run(
            [
                environment / "earmark", "annotate", "in", "--output", "out",
                "--runner", "PortableRunner", "--job_endpoint", f"localhost:{job_port}",
                "--environment_type", "EXTERNAL", "--environment_config", f"localhost:{pool_port}",
            ],
            cwd=tmp_path, env=inside, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The output holds 1 clip, 1 scored and 0 failed." in done.stdout


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def wait_for_port(port, seconds=60):
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens on {port}"
            time.sleep(0.1)


@pytest.fixture
def annotated(monkeypatch):
    """What `earmark annotate` would do: the options of each call, nothing done."""
    seen = []
    monkeypatch.setattr(pipeline.cli, "_run", seen.append)
    return seen


def test_the_templates_parameters_are_the_options_of_the_command_line():
    template = load("template")
    command = pipeline.cli.annotate
    stated = json.loads((DEPLOY / "metadata.json").read_text())
    assert stated == template.metadata(command), (
        "python deploy/template.py --metadata > deploy/metadata.json"
    )
    names = [parameter["name"] for parameter in stated["parameters"]]
    assert set(names) == {p.name for p in command.params} - template.LEFT_OUT
    assert {p.name for p in command.params} >= template.LEFT_OUT
    parsed = TemplateMetadata.from_json(json.dumps(stated), ignore_unknown_fields=False)
    assert [p.name for p in parsed.parameters] == names
    for parameter in stated["parameters"]:
        assert parameter["helpText"] and all(re.compile(r) for r in parameter.get("regexes", ()))


def test_patterns_take_what_click_takes():
    patterns = {
        p["name"]: p["regexes"][0]
        for p in load("template").metadata(pipeline.cli.annotate)["parameters"]
        if "regexes" in p
    }
    for name, good, bad in (
        ("top_k", "10", "ten"),
        ("threshold", "0.25", "a fifth"),
        ("pool", "mean", "median"),
        ("chunks", "true", "yes"),
    ):
        assert re.fullmatch(patterns[name], good) and not re.fullmatch(patterns[name], bad)


def test_what_the_launcher_gives_becomes_a_command_line(annotated):
    template = load("template")
    given = [
        "--inputs=gs://in/a.tar 'gs://in/b c/*.tar'", "--output=gs://out/tags", "--top_k=7",
        "--chunks=true", "--embeddings=false", "--threshold=", "--gpu=nvidia-l4",
        "--runner=DataflowRunner", "--project=p", "--region=r", "--machine_type=g2-standard-12",
        "--template_location=gs://out/job_object", "--experiments=a,b",
    ]  # fmt: skip
    arguments = template.command_line(pipeline.cli.annotate, given)
    result = CliRunner().invoke(pipeline.cli.cli, ["annotate", "--detach", *arguments])
    assert result.exit_code == 0, result.output
    (options,) = annotated
    assert options.inputs == ("gs://in/a.tar", "gs://in/b c/*.tar")
    assert (options.output, options.top_k, options.gpu) == ("gs://out/tags", 7, "nvidia-l4")
    assert (options.chunks, options.embeddings, options.threshold) == (True, False, None)
    assert options.detach
    assert {"--project=p", "--template_location=gs://out/job_object", "--experiments=a,b"} <= set(
        options.beam
    )


def test_a_template_submits_and_does_not_wait(monkeypatch, annotated):
    given = ["--inputs=gs://in/a.tar", "--output=gs://out", "--gpu=none", "--runner=DataflowRunner"]
    monkeypatch.setattr(sys, "argv", ["template.py", *given])
    with pytest.raises(SystemExit) as ended:
        load("template").main()
    assert not ended.value.code
    assert annotated[0].detach and annotated[0].inputs == ("gs://in/a.tar",)


def test_a_template_refuses_a_flag_that_is_neither_true_nor_false():
    with pytest.raises(ValueError, match="chunks is 'yes', expected true or false"):
        load("template").command_line(pipeline.cli.annotate, ["--chunks=yes"])


# ------------------------------------------------------- Cloud Build, deploy.sh


def test_cloud_build_takes_the_build_and_names_the_image_as_the_launcher_does():
    stated = yaml.safe_load((DEPLOY / "cloudbuild.yaml").read_text())
    build = Build.from_json(json.dumps(stated), ignore_unknown_fields=False)
    (step,) = build.steps
    assert f"--file={DEPLOY.name}/Dockerfile" in step.args
    values = {**build.substitutions, "PROJECT_ID": "my-project"}
    (name,) = (
        re.sub(r"\$\{(\w+)\}", lambda m: values[m.group(1)], image) for image in build.images
    )
    assert name == expected_image()
    arguments = {
        a.removeprefix("--build-arg=").partition("=")[0] for a in step.args if "--build-arg" in a
    }
    assert arguments <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    used = set(re.findall(r"\$\{(\w+)\}", (DEPLOY / "cloudbuild.yaml").read_text()))
    assert used == set(values)


def expected_image():
    tag = f"{__version__}-py3.11-beam{constraints()['apache-beam']}"
    return f"us-central1-docker.pkg.dev/my-project/earmark/earmark:{tag}"


def sh(*arguments, code=0, **settings):
    """(stdout, commands that it showed) of deploy.sh."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in (*CLOUD, "OUTPUT", "GPU", "CHECKPOINT", "DRY_RUN")
    }
    done = subprocess.run(
        ["bash", DEPLOY / "deploy.sh", *arguments],
        env=clean | settings, text=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    commands = [shlex.split(line[2:]) for line in done.stderr.splitlines() if line.startswith("+ ")]
    return done.stdout + done.stderr, commands


def dry(*arguments, **settings):
    return sh(*arguments, DRY_RUN="1", **CLOUD | settings)[1]


def test_deploy_sh_is_well_formed():
    checked(["bash", "-n", DEPLOY / "deploy.sh"])
    assert os.access(DEPLOY / "deploy.sh", os.X_OK)
    assert "\nset -euo pipefail\n" in (DEPLOY / "deploy.sh").read_text()
    if shutil.which("shellcheck"):
        checked(["shellcheck", DEPLOY / "deploy.sh"])
    shown, _ = sh("help")
    for target in ("image", "template", "run", "run-template", "jobs", "watch", "cancel"):
        assert f"deploy/deploy.sh {target} " in shown


def test_deploy_sh_says_what_is_missing():
    assert "set PROJECT" in sh("image", code=2)[0]
    assert "set BUCKET" in sh("image", code=2, PROJECT="p", REGION="r")[0]
    assert "expected gs://" in sh("image", code=2, **CLOUD | {"BUCKET": "b"})[0]
    assert "no target 'deplyo'" in sh("deplyo", code=2, **CLOUD)[0]
    assert "needs an INPUT" in sh("run", code=2, DRY_RUN="1", **CLOUD)[0]
    assert "needs a JOB_ID" in sh("cancel", code=2, DRY_RUN="1", **CLOUD)[0]


def test_deploy_sh_builds_and_launches_the_same_image():
    (build,) = dry("image")
    assert build[:3] == ["gcloud", "builds", "submit"]
    substitutions = build[build.index("--substitutions") + 1]
    assert f"_TAG={expected_image().rpartition(':')[2]}" in substitutions
    (template,) = dry("template")
    assert template[template.index("--image") + 1] == expected_image()
    (run,) = dry(
        "run-template", "gs://a b/*.tar", "gs://c/d,e.tar", "top_k=5", CHECKPOINT="bundled"
    )
    spec = run[run.index("--template-file-gcs-location") + 1]
    assert spec == template[4] and spec.startswith("gs://my-bucket/earmark/templates/")
    parameters = run[run.index("--parameters") + 1]
    assert parameters.startswith("^~^")
    given = [f"--{p}" for p in parameters[3:].split("~")]
    names = {
        parameter["name"]
        for parameter in json.loads((DEPLOY / "metadata.json").read_text())["parameters"]
    }
    assert {g[2:].partition("=")[0] for g in given} <= names
    arguments = load("template").command_line(pipeline.cli.annotate, given)
    assert arguments[-2:] == ["gs://a b/*.tar", "gs://c/d,e.tar"]
    assert "--checkpoint=bundled" in arguments and "--top-k=5" in arguments


def test_deploy_sh_run_is_a_command_that_earmark_takes(annotated):
    (command,) = dry("run", "gs://a/*.tar", "--limit", "5", "--num_workers", "4", GPU="none")
    assert command[0] == "earmark"
    result = CliRunner().invoke(pipeline.cli.cli, command[1:])
    assert result.exit_code == 0, result.output
    (options,) = annotated
    assert (options.inputs, options.limit, options.gpu) == (("gs://a/*.tar",), 5, "none")
    assert options.output == "gs://my-bucket/earmark/tags"
    assert "earmark-worker@my-project.iam.gserviceaccount.com" in options.beam


@pytest.mark.parametrize(("state", "code"), [("DONE", 0), ("FAILED", 1), ("CANCELLED", 1)])
def test_deploy_sh_watch_tells_how_a_job_ended(tmp_path, state, code):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(
        f"#!/bin/sh\ncase \"$*\" in *describe*) echo JOB_STATE_{state};; *logging*) echo 'an error';; esac\n"
    )
    gcloud.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    shown, commands = sh("watch", "2026-job", code=code, PATH=path, **CLOUD)
    assert f"JOB_STATE_{state}" in shown and "an error" in shown
    assert [command[1] for command in commands] == ["dataflow", "logging"]


def test_deploy_sh_cancel_names_job_and_region():
    (command,) = dry("cancel", "2026-job")
    assert command == [
        "gcloud", "dataflow", "jobs", "cancel", "2026-job", "--project", "my-project", "--region", "us-central1"
    ]  # fmt: skip


def gcloud_commands():
    """Every gcloud command of deploy.sh and of the README."""
    yield from (c for t in ("image", "template", "jobs") for c in dry(t))
    yield from (c for t in ("watch", "cancel") for c in dry(t, "job"))
    yield from dry("run-template", "gs://a/*.tar")
    yield from (c for c in map(shlex.split, readme_commands()) if c[0] == "gcloud")


def test_gcloud_has_the_flags_that_are_used():
    tool = shutil.which("gcloud")
    table = tool and Path(tool).resolve().parent.parent / "data" / "cli" / "gcloud_completions.py"
    if not table or not table.exists():
        pytest.skip("gcloud, which is on no package index that the tests use, is not installed")
    spec = importlib.util.spec_from_file_location("gcloud_completions", table)
    completions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(completions)
    for command in gcloud_commands():
        node, rest = completions.STATIC_COMPLETION_CLI_TREE, command[1:]
        flags = set(node["flags"])
        while rest and rest[0] in node["commands"]:
            node = node["commands"][rest.pop(0)]
            flags |= set(node["flags"])
        assert not node["commands"], command
        used = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert used <= flags, command


# ---------------------------------------------------------------------- Terraform


def terraform():
    """({kind: {name: body}} of resources, variables, outputs, text) of deploy/terraform."""
    texts = {file.name: file.read_text() for file in sorted((DEPLOY / "terraform").glob("*.tf"))}
    parsed = [hcl2.loads(text) for text in texts.values()]

    def named(block):
        entries = [entry for file in parsed for entry in file.get(block, ())]
        return {key.strip('"'): body for entry in entries for key, body in entry.items()}

    resources = {}
    for file in parsed:
        for entry in file.get("resource", ()):
            for kind, bodies in entry.items():
                for name, body in bodies.items():
                    resources[kind.strip('"'), name.strip('"')] = body
    return resources, named("variable"), named("output"), "\n".join(texts.values())


def test_terraforms_references_lead_somewhere():
    resources, variables, _, text = terraform()
    code = re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)
    assert set(re.findall(r"\bvar\.(\w+)", code)) == set(variables)
    known = {f"{kind}.{name}" for kind, name in resources}
    referred = set(
        re.findall(r"(?<![\w.\"])(google_\w+\.\w+)", code.replace("data.google_", "data_google_"))
    )
    assert referred and referred <= known
    for file in re.findall(r'"\$\{path\.module\}/([^"$]+)"', code):
        assert list((DEPLOY / "terraform").glob(file)) or (DEPLOY / "terraform" / file).exists(), (
            file
        )
    used = set(re.findall(r"-var '?\"?(\w+)=", README))
    assert used and used <= set(variables)
    needed = {name for name, body in variables.items() if "default" not in body}
    apply = next(c for c in readme_commands() if " apply " in c)
    assert needed <= set(re.findall(r"-var '?\"?(\w+)=", apply))


def test_nobody_may_more_than_is_needed():
    resources, *_ = terraform()
    roles = {}
    for (kind, name), body in resources.items():
        if kind.endswith("_iam_member"):
            roles.setdefault(name.partition("_")[0], set()).add(body["role"].strip('"'))
    assert roles == {
        "worker": {
            "roles/dataflow.worker", "roles/storage.objectViewer", "roles/storage.objectUser",
            "roles/storage.legacyBucketReader", "roles/artifactregistry.reader",
            # With requester_pays, and with flex_template:
            "roles/serviceusage.serviceUsageConsumer", "roles/dataflow.developer", "roles/iam.serviceAccountUser",
        },
        "builder": {"roles/logging.logWriter", "roles/storage.objectViewer", "roles/artifactregistry.writer"},
        "launcher": {
            "${each.value.role}", "roles/iam.serviceAccountUser", "roles/storage.objectViewer",
            "roles/storage.objectUser", "roles/storage.legacyBucketReader", "roles/artifactregistry.reader",
        },
        "storage": {"roles/cloudkms.cryptoKeyEncrypterDecrypter"},
    }  # fmt: skip
    text = terraform()[3]
    assert not re.search(r"roles/(owner|editor|viewer)\b|\.admin\"", text)
    # Only for whole projects that these roles cannot be given for less.
    projects = {b["role"] for (k, _), b in resources.items() if k == "google_project_iam_member"}
    assert not any("storage." in role or "artifactregistry." in role for role in projects)


def test_optional_rights_are_given_only_on_demand():
    resources, *_ = terraform()
    for name, variable in (
        ("worker_pays", "requester_pays"),
        ("worker_launches_template", "flex_template"),
        ("worker_acts_as_itself", "flex_template"),
        ("storage_encrypts", "kms_key"),
    ):
        (body,) = (b for (_, n), b in resources.items() if n == name)
        assert f"var.{variable}" in body["count"]


# --------------------------------------------------------------------- monitoring


def queries():
    board = json.loads((DEPLOY / "monitoring" / "dashboard.json").read_text())
    for tile in board["mosaicLayout"]["tiles"]:
        assert tile["xPos"] + tile["width"] <= board["mosaicLayout"]["columns"]
        for data in tile["widget"]["xyChart"]["dataSets"]:
            yield data["timeSeriesQuery"]["prometheusQuery"]
    for file in (DEPLOY / "monitoring").glob("alert-*.json"):
        policy = AlertPolicy.from_json(file.read_text(), ignore_unknown_fields=False)
        assert policy.documentation.content and policy.combiner.name == "OR"
        for condition in policy.conditions:
            yield condition.condition_prometheus_query_language.query


def test_dashboard_and_alerts_ask_for_metrics_that_exist():
    # As Dataflow exports them: counters by name, distributions with a suffix.
    ours = set(COUNTERS) | {
        f"{d}_{s}" for d in DISTRIBUTIONS for s in ("MIN", "MAX", "MEAN", "COUNT")
    }
    asked, services = set(), set()
    for query in queries():
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}")
        services |= set(re.findall(r"dataflow_googleapis_com:(\w+)\{", query))
        found = re.findall(r'metric_name="(\w+)"', query)
        assert len(found) == query.count("job_user_counter{")
        asked |= set(found)
    assert asked <= ours
    assert {"clips", "clips_failed", "wait_for_audio_msec_MEAN", "shard_msec_MEAN"} <= asked
    # The first is Beam's; the others are in Google's list of Dataflow's metrics.
    assert services == {
        "job_user_counter",
        "job_is_failed",
        "job_elapsed_time",
        "job_current_num_vcpus",
    }


def test_there_is_an_alert_for_each_way_to_waste_money():
    names = {file.stem for file in (DEPLOY / "monitoring").glob("alert-*.json")}
    assert names == {"alert-failed", "alert-waiting", "alert-failures", "alert-stuck"}


# ------------------------------------------------------------------------- README


def readme_commands():
    blocks = re.findall(r"^ *```console\n(.*?)^ *```", README, flags=re.DOTALL | re.MULTILINE)
    return [line.strip()[2:] for block in blocks for line in block.splitlines() if line.strip()]


def test_readme_shows_commands_and_invents_no_output():
    blocks = re.findall(r"^ *```console\n(.*?)^ *```", README, flags=re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.splitlines() if line.strip()]
    assert len(lines) >= 20 and all(line.startswith("$ ") for line in lines)
    for command in readme_commands():
        checked(["bash", "-n", "-c", command])


@pytest.mark.parametrize(
    "command", [c for c in readme_commands() if c.startswith("earmark ")], ids=lambda c: c[:60]
)
def test_earmark_takes_the_commands_of_the_readme(command, annotated):
    words = shlex.split(
        command.replace("$PROJECT", "p").replace("$REGION", "r").replace("$BUCKET", "gs://b")
    )
    if ">" in words:
        words = words[: words.index(">")]
    if words[1] == "annotate":
        result = CliRunner().invoke(pipeline.cli.cli, words[1:])
        assert result.exit_code == 0, result.output
        assert len(annotated) == 1 and annotated[0].inputs == ("gs://my-audio/shards/*.tar",)
    else:
        sub = pipeline.cli.cli.commands[words[1]]
        assert isinstance(sub, click.Command)
        sub.make_context(words[1], words[2:])


def test_the_other_tools_here_take_the_commands_of_the_readme(tmp_path, monkeypatch):
    done = set()
    for command in readme_commands():
        words = shlex.split(command)
        assignments = [w for w in words if re.match(r"[A-Z_]+=", w)]
        words = words[len(assignments) :] or words
        if words[:4] == ["python", "-m", "pip", "install"]:
            from pip._internal.commands import create_command

            options, rest = create_command("install").parse_args(words[4:])
            assert rest == [] and options.editables == [".[cloud]"]
            assert "cloud" in PROJECT["optional-dependencies"]
            done.add("pip")
        elif words[:2] == ["python", "deploy/lock.py"]:
            lock_module = load("lock")
            monkeypatch.setattr(
                sys, "argv", ["lock.py", *words[2:], "--output", str(tmp_path / "x")]
            )
            monkeypatch.setattr(lock_module, "resolve", lambda wanted, pins: [])
            if sys.version_info[:2] == (3, 11) and sys.platform == "linux":
                lock_module.main()
            done.add("lock")
        elif words[0] == "deploy/deploy.sh":
            assert dry(*words[1:])
            done.add("deploy")
        elif words[:2] == ["python", "-c"]:
            (tmp_path / "tags" / "clips").mkdir(parents=True)
            schema = clips_schema(527, 8, RowOptions(thresholds=(0.2,) * 527))
            pq.write_table(schema.empty_table(), tmp_path / "tags" / "clips" / "a.parquet")
            assert "name" in checked([sys.executable, *words[1:]], cwd=tmp_path)
            done.add("duckdb")
    assert done == {"pip", "lock", "deploy", "duckdb"}


def test_links_of_the_readme_lead_somewhere():
    slugs = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in slugs, target
        elif not target.startswith("https://"):
            assert (DEPLOY / target.partition("#")[0]).exists(), target
    for name in re.findall(r"^\| (`[^|]+`) \|", README.partition("## 1.")[0], re.MULTILINE):
        assert all((DEPLOY / part).exists() for part in re.findall(r"`([^`]+)`", name))


def test_the_table_of_machines_is_the_launchers_and_its_arithmetic_is_right():
    rows = re.findall(r"^\| `([\w-]+)` \| `([\w-]+)` \|(.+)\|$", README, re.MULTILINE)
    assert [row[0] for row in rows] == [*dataflow.GPUS, dataflow.NO_GPU]
    for gpu, machine, rest in rows:
        vcpus, _memory, _gpu, peak, gpu_clips, vorbis, flac, _ = (
            cell.strip() for cell in rest.split("|")
        )
        known = dataflow.GPUS[gpu].machines[1] if gpu in dataflow.GPUS else None
        assert (machine, int(vcpus)) == (known or (dataflow.CPU_MACHINE, dataflow.CPU_VCPUS))
        cores = int(vcpus) / 2
        assert number(vorbis) == round(cores / 0.005)
        assert number(flac) == round(cores / 0.0007)
        if peak != "–":
            assert number(gpu_clips) == round(0.5 * float(peak) * 1e12 / 131e9)
    memory_bytes = 64 * 163_840 * 4
    assert f"= {memory_bytes / 1e6:.0f} MB a batch" in README
    assert f"so {3 * memory_bytes / 1e6:.0f} MB" in README


def number(cell):
    return int(cell.replace(",", ""))
