"""The model: its labels, its features, and the student that scores audio.

>>> from student import Student
>>> student = Student.load("bookbot/distil-ast-audioset")
>>> scores = student.score([waveform])  # float32 [1, 527]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from student.checkpoint import CheckpointError
    from student.model import DeviceError, Student

__all__ = ["BUNDLED", "CheckpointError", "DeviceError", "Student"]

BUNDLED = "bundled"  # the name of the demonstration checkpoint that comes with the package


def __getattr__(name: str) -> Any:
    # Lazy, because torch takes seconds and the labels do not need it.
    if name == "CheckpointError":
        from student.checkpoint import CheckpointError

        return CheckpointError
    if name in ("DeviceError", "Student"):
        from student import model

        return getattr(model, name)
    raise AttributeError(f"module 'student' has no attribute {name!r}")
