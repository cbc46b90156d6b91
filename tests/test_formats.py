"""docs/formats.md has a table of what becomes of real files; `python tests/test_formats.py` writes it."""

from __future__ import annotations

import io
import sys
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from student.feature_spec import FeatureSpec
from transforms.decode import AudioDecoder
from transforms.decode_clip import decode_clip
from transforms.records import ClipEnd, ClipError, EncodedClip

PAGE = Path(__file__).parents[1] / "docs" / "formats.md"
BEGIN, END = "<!-- begin -->\n", "<!-- end -->\n"

_CONTAINERS = (
    (0, b"RIFX", "WAV, big-endian (RIFX)"),
    (0, b"RF64", "RF64"),
    (0, b"RIFF", "WAV"),
    (0, b"fLaC", "FLAC"),
    (0, b"OggS", "Ogg"),
    (4, b"ftyp", "MP4"),
    (0, b"NIST", "SPHERE"),
)


def table(zoo: Path) -> str:
    """A row for each container and codec of the zoo."""
    rows: dict[tuple[str, str, str], Counter[str]] = {}
    for path in sorted(zoo.rglob("*")):
        if path.is_dir() or path.parent == zoo:
            continue
        content = path.read_bytes()
        decoder = AudioDecoder(io.BytesIO(content))
        try:
            for _ in decoder.mono(16_000):
                pass
        except ClipError:
            pass
        *_, end = decode_clip(
            EncodedClip("", io.BytesIO(content), len(content), "", {}), FeatureSpec()
        )
        assert isinstance(end, ClipEnd)
        key = container(content, end.codec), end.codec or "", decoder.library or ""
        if end.codec is None:
            key = key[0], "", ""
        outcome = "whole" if end.error is None else f"`{end.error.type}`"
        rows.setdefault(key, Counter())[outcome] += 1
    lines = ["| container | codec | decoded by | files | outcome |", "|---|---|---|---|---|"]
    for (kind, codec, library), outcomes in sorted(rows.items()):
        said = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
        code = f"`{codec}`" if codec else "none found"
        lines.append(
            f"| {kind} | {code} | {library or 'neither'} | {sum(outcomes.values())} | {said} |"
        )
    return "\n".join(lines) + "\n"


def container(content: bytes, codec: str | None) -> str:
    for place, magic, name in _CONTAINERS:
        if content[place : place + len(magic)] == magic:
            return name
    if codec == "flac":
        return "FLAC, from the middle"
    if content[:3] == b"ID3" or content[:1] == b"\xff":
        return "ADTS" if codec == "aac" else "MPEG audio"
    return "none" if content else "an empty file"


def written(page: str, rows: str) -> str:
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + rows + END + rest.partition(END)[2]


def test_the_table_of_formats_is_current(shared: Path) -> None:
    page = PAGE.read_text("utf-8")
    assert written(page, table(shared / "audio-zoo")) == page, "run python tests/test_formats.py"


if __name__ == "__main__":
    zoo = Path(__file__).resolve().parents[2] / "shared" / "audio-zoo"
    PAGE.write_text(written(PAGE.read_text("utf-8"), table(zoo)), "utf-8")
