"""Which files are taken for audio, and which for tars, by their names."""

from __future__ import annotations

import posixpath

AUDIO_SUFFIXES = frozenset(
    ".3gp .aac .ac3 .aif .aifc .aiff .amr .ape .asf .au .avi .bwf .caf .dff .dsf .dts .eac3 .flac .flv .m4a .m4b "
    ".mka .mkv .mov .mp2 .mp3 .mp4 .mpc .mpga .nist .oga .ogg .opus .rf64 .rm .snd .spx .sph .tak .tta .voc .w64 "
    ".wav .wave .webm .wma .wv".split()
)
TAR_SUFFIXES = (
    *(".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2", ".tbz"),
    *(".tar.xz", ".txz"),
)


def is_audio(name: str) -> bool:
    """Whether a file's last suffix is that of an audio format; hidden files are none."""
    hidden = posixpath.basename(name).startswith(".")
    return not hidden and posixpath.splitext(name)[1].lower() in AUDIO_SUFFIXES
