"""What a benchmark says of its machine, and how it keeps its figures in `RESULTS.md`."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "RESULTS.md"

# What decides which matrix products a processor is good at.
_INSTRUCTIONS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16",
    "amx_int8", "asimd", "bf16", "i8mm", "sve",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """The processor, its instructions, torch and its threads, the GPU, the load of the moment."""
    file = Path("/proc/cpuinfo")
    facts = file.read_text() if file.exists() else ""
    names = re.findall(r"^model name\s*: (.+)$", facts, re.MULTILINE)
    flags = re.findall(r"^(?:flags|Features)\s*: (.+)$", facts, re.MULTILINE)
    known = set(flags[0].split()) if flags else set()
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instructions": [name for name in _INSTRUCTIONS if name in known],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "load_average_1_5_15_min": [round(load, 1) for load in os.getloadavg()],
    }


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def append_results(title: str, about: dict[str, Any], lines: Iterable[str]) -> None:
    """Adds a section to `RESULTS.md`.

    Args:
        title: what was run.
        about: of `machine`.
        lines: Markdown.
    """
    where = f"{about['cores']} cores of {about['cpu']}"
    if about["gpu"]:
        where += f", {about['gpu']}"
    loads = ", ".join(map(str, about["load_average_1_5_15_min"]))
    told = (
        f"{where} ({', '.join(about['instructions'])}); Python {about['python']}, torch "
        f"{about['torch']}, {about['threads']} threads; load average {loads}."
    )
    with RESULTS.open("a") as file:
        file.write("\n".join(["", f"## {about['date']}: {title}", "", told, "", *lines, ""]))
