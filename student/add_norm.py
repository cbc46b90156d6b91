"""A residual's sum and the norm after it in one pass over a GPU's memory, in Triton.

torch reads and writes the widest part of a layer's memory traffic three times here: to add, to
norm and to round. Triton comes with torch's builds for CUDA.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(  # type: ignore[no-untyped-def]
    hidden, added, weight, bias, total, normal, hidden_rows, width, eps, BLOCK: tl.constexpr
):
    number = tl.program_id(0).to(tl.int64)
    first = number * width
    at = tl.arange(0, BLOCK)
    inside = at < width
    row = tl.load(hidden + number % hidden_rows * width + at, inside, other=0.0)
    row += tl.load(added + first + at, inside, other=0.0).to(tl.float32)
    tl.store(total + first + at, row, inside)
    centred = tl.where(inside, row - tl.sum(row) / width, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred) / width + eps)
    scaled = centred * scale * tl.load(weight + at, inside) + tl.load(bias + at, inside)
    tl.store(normal + first + at, scaled.to(normal.dtype.element_ty), inside)


def add_norm(
    hidden: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A sum, and its layer norm.

    Args:
        hidden: float32 [n, tokens, width], or [1, tokens, width] for all n; contiguous.
        added: [n, tokens, width], contiguous.
        weight: float32 [width], as `bias`.
        bias: of the norm.
        eps: of the norm.

    Returns:
        The sum, float32 as `hidden`, and its norm in the dtype of `added`.
    """
    width = added.shape[-1]
    total, normal = torch.empty_like(added, dtype=torch.float32), torch.empty_like(added)
    rows, hidden_rows = added.numel() // width, hidden.numel() // width
    block = triton.next_power_of_2(width)
    _add_norm[(rows,)](
        hidden, added, weight, bias, total, normal, hidden_rows, width, eps, BLOCK=block, num_warps=4
    )  # fmt: skip
    return total, normal
