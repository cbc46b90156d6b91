"""What a run on this machine computes on: devices, processes, and what is known of them."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import replace
from pathlib import Path

import torch

from pipeline import dataflow
from pipeline.options import AnnotateOptions, UsageError
from student.engine import choose_kernel
from student.model import choose_device, choose_dtype

# Of each worker thread. Never 0 unasked: a decoder is compiled code that meets files of anybody's
# making, and one that crashes is to cost a clip and not a worker.
DECODE_PROCESSES = 1
_MOST_A_GPU = 4  # processes that share one
_CORES_A_PROCESS = 4  # one hands over what three decode
_BYTES_A_PROCESS = 8 << 30  # a GPU's memory for a student's batches, and a context
CLUSTERS = ("portable", "flink", "spark")  # runners whose workers may be other machines


def choose_workers_here(
    options: AnnotateOptions, runner: str, by_hand: int | None = None
) -> tuple[dataflow.Workers, list[str]]:
    """What workers compute on that are here, or on a cluster that this machine does not see.

    Args:
        options: of the command line.
        runner: Beam's, in lower case.
        by_hand: how many workers Beam was told to start, 0 for as many as there are cores.
    """
    if runner in CLUSTERS and options.devices is not None:
        raise UsageError("--devices is for a run on this machine; a cluster has its own workers")
    if runner in CLUSTERS and options.device.startswith("cuda"):
        if options.dtype in ("auto", "reduced"):
            raise UsageError(
                f"--device {options.device} is of the workers, which this machine does not see: say what "
                "they compute in, --dtype bfloat16 (Ampere and later) or float16"
            )
        decoding = (
            DECODE_PROCESSES if options.decode_processes is None else options.decode_processes
        )
        return dataflow.Workers(
            dataflow.NO_GPU, 0, options.device, options.dtype, decode_processes=decoding
        ), []
    device = choose_device(options.device)
    dtype = options.dtype
    if dtype != "reduced" or device.type == "cuda":  # else it depends on the checkpoint
        dtype = str(choose_dtype(dtype, device)).removeprefix("torch.")
    notes = []
    if runner in CLUSTERS and options.device == "auto":
        notes.append(
            f"the workers will compute on {device}, which is what this machine has; where they have "
            "something else, say --device"
        )
    devices = processes = 1 if options.devices is None else processes_of(options.devices, device)
    if device.type == "cuda" and runner not in CLUSTERS and by_hand is None:
        a_gpu = options.processes_per_gpu
        processes *= a_gpu or processes_a_gpu(device, len(os.sched_getaffinity(0)) // devices)
    elif options.processes_per_gpu is not None:
        raise UsageError(
            "--processes-per-gpu is for a run on a GPU of this machine, and not beside Beam's own "
            "--direct_num_workers or --direct_running_mode: leave it out"
        )
    workers = dataflow.Workers(dataflow.NO_GPU, 0, str(device), dtype, processes, devices=devices)
    return with_shards(workers, processes, options, runner, by_hand), notes


def with_shards(
    workers: dataflow.Workers,
    shards: int,
    options: AnnotateOptions,
    runner: str,
    by_hand: int | None = None,
) -> dataflow.Workers:
    """`workers` without the processes that find no shard, which would load a student for nothing.

    Args:
        workers: of `choose_workers_here`, as the rest.
        shards: that there are to do.
        options: of the command line.
        runner: Beam's, in lower case.
        by_hand: of Beam's workers.
    """
    processes = max(1, min(workers.processes, shards))
    decoding = DECODE_PROCESSES
    if options.decode_processes is not None:
        decoding = options.decode_processes
    elif workers.device.startswith("cuda") and runner not in CLUSTERS:
        # A GPU scores more clips a second than one Python decodes; a CPU has no core to spare.
        # The one process of a GPU keeps a core busy, several have theirs half idle.
        cores, at_once = len(os.sched_getaffinity(0)), processes
        if by_hand is not None:  # each of Beam's threads has decoders of its own
            at_once = by_hand or cores
        decoding = max(1, cores // at_once - (processes <= workers.devices))
    return replace(workers, processes=processes, decode_processes=decoding)


def processes_a_gpu(device: torch.device, cores: int) -> int:
    """How many processes share a GPU, each with a student and decoders of its own.

    One Python reads, hands over and writes some 1,000 clips a second, where an H200 scores 4,000.

    Args:
        device: a GPU.
        cores: of this machine, for each GPU.
    """
    # Not what is free of it: to ask for that is to begin to use the GPU in this process too.
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(_MOST_A_GPU, cores // _CORES_A_PROCESS, memory // _BYTES_A_PROCESS))


def processes_of(asked: str, device: torch.device) -> int:
    """How many worker processes `--devices` asks for."""
    there = torch.cuda.device_count() if device.type == "cuda" else None
    cores = len(os.sched_getaffinity(0))
    if device.index is not None:
        raise UsageError(f"--devices {asked} and --device {device} contradict each other: give one")
    if asked == "all":
        if there is None:
            raise UsageError(
                "--devices all asks for every GPU of this machine, and it has none that torch can use; "
                "for several processes on its CPU: --device cpu --devices N"
            )
        return there
    if not asked.isdigit() or not 1 <= int(asked) <= (there or cores):
        most = f"{there} GPUs" if there else f"{cores} cores"
        raise UsageError(
            f"--devices {asked!r}: expected all, or a number up to the {most} of this machine"
        )
    return int(asked)


def computed_by(workers: dataflow.Workers, asked_dtype: str, hidden_size: int) -> dict[str, str]:
    """What `run.json` says of a run's device: its scores may differ in the last digits by it.

    Args:
        workers: of `choose_workers_here`, their dtype settled.
        asked_dtype: what the user said.
        hidden_size: how wide the student is.
    """
    device = torch.device(workers.device)
    made = {
        "device": workers.device,
        "processor": processor_of(device),
        "kernel": choose_kernel(device, getattr(torch, workers.dtype), hidden_size),
    }
    if asked_dtype == "reduced" and workers.dtype == "float32":
        made["dtype"] = (
            "float32: this processor has nothing faster that keeps this student's scores within 0.01"
        )
    return made


def processor_of(device: torch.device) -> str:
    """The name of a GPU, or of this machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")
    named = facts.exists() and re.search(r"^model name\s*: (.+)$", facts.read_text(), re.M)
    return named.group(1).strip() if named else platform.processor() or platform.machine()
