"""Products with binary codes by table lookup, in torch: a reference for kernels, and no fast path.

LUT-GEMM, arXiv:2206.09557, section 3. For every 8 inputs all 256 signed sums are tabulated once; a byte of 8
signs of one output is then one lookup instead of 8 additions. Nothing is ever expanded to weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 8
"""Inputs of one table."""


def tables(x_MK: Tensor) -> Tensor:
    """(M, K / 8, 256): entry v of a chunk is the sum of its inputs, input j negative where bit j of v is 0.

    Built by doubling: setting one more bit adds twice its input.
    """
    x_MCJ = x_MK.unflatten(1, (-1, CHUNK))
    table_MCV = -x_MCJ.sum(2, keepdim=True)
    for j in range(CHUNK):
        table_MCV = torch.cat([table_MCV, table_MCV + 2 * x_MCJ[..., j, None]], 2)
    return table_MCV


def lookup_product(
    x_MK: Tensor, planes_WQN: Tensor, alpha_GQN: Tensor, offset_GN: Tensor | None, group: int
) -> Tensor:
    """(M, N) in the dtype of x; layouts as in `axicon/model/binary_code.py`.

    A group (0: the whole row) is a multiple of 8 inputs wide, or ValueError.
    """
    words, bits, outputs = planes_WQN.shape
    groups, inputs = len(alpha_GQN), x_MK.shape[1]
    if groups > 1 and group % CHUNK:
        raise ValueError(f"groups of {group}; tables of {CHUNK} inputs do not fit them")
    table_MCV = tables(F.pad(x_MK, (0, 32 * words - inputs)))
    # Chunk c of a word's plane is its byte c: every machine that torch runs on keeps the low byte first.
    octets = planes_WQN.permute(1, 2, 0).reshape(-1).view(torch.uint8)
    bytes_QNC = octets.view(bits, outputs, -1).long()
    count = table_MCV.shape[1]
    chunks_of = count if groups == 1 else group // CHUNK
    y_MN = x_MK.new_zeros(len(x_MK), outputs)
    for g in range(groups):
        chunks = range(g * chunks_of, min((g + 1) * chunks_of, count))
        for i in range(bits):
            found_MN = sum(table_MCV[:, c, bytes_QNC[i, :, c]] for c in chunks)
            y_MN += alpha_GQN[g, i].to(x_MK.dtype) * found_MN
        if offset_GN is not None:
            # The last entry of a table is the sum of its inputs.
            y_MN += table_MCV[:, chunks.start : chunks.stop, -1].sum(1)[:, None] * offset_GN[g].to(x_MK.dtype)
    return y_MN
