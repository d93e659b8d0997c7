"""Packed codes to the entries of a table: codebooks, sorted groups and slopes are decoded this way."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from .cpu import native
from .kernels import table_decode
from .rows import decode_parts


def decode_table(codes: Tensor, shape: tuple[int, ...], table: Tensor, bits: int) -> Tensor:
    """table[codes] as a tensor of that shape; codes in rows of COLS, table [2**bits] in the dtype of the result."""
    by_hand = partial(native.table_decode, table=table, bits=bits)
    return decode_parts(table_decode, codes, shape, bits, [table], by_hand=by_hand, bits=bits)
