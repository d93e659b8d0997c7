"""The operators in C++: each takes what its definition takes and gives the same bits, or returns NotImplemented."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..layout import in_memory_order
from ..memory import fresh
from ..packing import COLS, codes_nbytes
from .library import library_for

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 1024  # columns of a group


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def check(what: str, have: int, needed: int) -> None:
    """No pointer is handed out to less than the library reads."""
    if have != needed:
        raise ValueError(f"{what}: {have} bytes or numbers where {needed} are needed: the payload is damaged.")


def _takes(cols: int, bits: int) -> bool:
    return bits <= 8 and cols % 16 == 0 and cols <= LARGEST


def flat_tensor(n: int, dtype: torch.dtype) -> Tensor:
    return fresh(n, dtype, torch.device("cpu"))


class FeatureTables:
    """Mean and root of each element of a period of groups, after which they repeat: fp32 [period, cols] or None."""

    def __init__(self, features: Tensor | None, inner: int, n: int, cols: int) -> None:
        self.period, self.mean, self.root = 1, None, None
        if features is not None:
            span = features.shape[1] * inner
            self.period = min(math.lcm(span, cols) // cols, -(-n // cols))
            index = _feature_index(features.shape[1], inner, min(self.period * cols, n))
            self.mean, self.root = features[0].float()[index], features[1].float()[index]

    @property
    def inverse(self) -> Tensor | None:
        return None if self.root is None else 1 / self.root


@functools.lru_cache(16)
def _feature_index(features: int, inner: int, length: int) -> Tensor:
    return torch.arange(length, device="cpu") // inner % features


def raise_counter(nonfinite: Tensor | None, count: int) -> None:
    if nonfinite is not None and count:
        nonfinite += count


def _group_codes(x: Tensor, features, inner, scale, cols, bits, key, nonfinite, codes, scales, out) -> None:  # noqa: ANN001
    tables = FeatureTables(features, inner, x.numel(), cols)
    inverse = tables.inverse  # alive during the call
    scale = None if scale is None else scale.float().contiguous()
    count = library_for(x.numel()).group_codes(
        x.data_ptr(), KINDS[x.dtype], key is not None, bits, pointer(tables.mean), pointer(inverse),
        pointer(tables.root), pointer(scale), tables.period, x.numel(), cols, (key or 0) & 0xFFFFFFFF,
        pointer(codes), pointer(scales), pointer(out),
    )  # fmt: skip
    if scale is None:
        raise_counter(nonfinite, count)


def quantize_groups(x, features, inner, scale, cols, bits, key, nonfinite):  # noqa: ANN001, ANN201
    if x.dtype not in FLOATS or not x.numel() or not _takes(cols, bits) or library_for(x.numel()) is None:
        return NotImplemented
    x, n = x.contiguous(), x.numel()
    codes = torch.empty(codes_nbytes(n, cols, bits), dtype=torch.uint8)
    scales = torch.empty(0 if scale is not None else -(-n // cols), 2, dtype=torch.bfloat16)
    _group_codes(x, features, inner, scale, cols, bits, key, nonfinite, codes, scales, None)
    return codes, scales


def roundtrip_groups(x, features, inner, scale, cols, bits, key, nonfinite):  # noqa: ANN001, ANN201
    if x.dtype not in FLOATS or not x.numel() or not _takes(cols, bits) or library_for(x.numel()) is None:
        return NotImplemented
    lying = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
    if x.is_contiguous() or not lying.is_contiguous():
        out = flat_tensor(x.numel(), x.dtype)
        _group_codes(x.contiguous(), features, inner, scale, cols, bits, key, nonfinite, None, None, out)
        out = out.view(x.shape)
        return out if x.is_contiguous() else torch.empty_like(x).copy_(out)
    out = flat_tensor(x.numel(), x.dtype)
    if scale is not None and key is None:  # one scale, no counter: the order makes no difference
        _group_codes(lying, None, 1, scale, cols, bits, key, nonfinite, None, None, out)
        return out.view(lying.shape).permute(0, 3, 1, 2)
    images, channels, height, width = x.shape
    if features is None and scale is None and channels % 16 == 0 and height * width % cols == 0:
        count = library_for(x.numel()).planes_roundtrip(
            x.data_ptr(), KINDS[x.dtype], key is not None, bits, images, height * width, channels, cols,
            (key or 0) & 0xFFFFFFFF, out.data_ptr(),
        )  # fmt: skip
        raise_counter(nonfinite, count)
        return out.view(lying.shape).permute(0, 3, 1, 2)
    _group_codes(x.contiguous(), features, inner, scale, cols, bits, key, nonfinite, None, None, out)
    return torch.empty_like(x).copy_(out.view(x.shape))


def dequantize_groups(codes, scales, features, inner, shape, dtype, cols, bits):  # noqa: ANN001, ANN201
    n = math.prod(shape)
    if dtype not in FLOATS or scales.dtype not in (torch.float32, torch.bfloat16) or not n or not _takes(cols, bits):
        return NotImplemented
    if (library := library_for(n)) is None:
        return NotImplemented
    check("codes", codes.nbytes, codes_nbytes(n, cols, bits))
    if scales.numel() != 2:
        check("scales", scales.numel(), 2 * -(-n // cols))
    codes, scales, out = codes.contiguous(), scales.contiguous(), flat_tensor(n, dtype)
    tables = FeatureTables(features, inner, n, cols)
    library.group_values(
        codes.data_ptr(), bits, scales.data_ptr(), scales.dtype == torch.bfloat16, scales.numel() == 2,
        pointer(tables.mean), pointer(tables.root), tables.period, n, cols, KINDS[dtype], out.data_ptr(),
    )  # fmt: skip
    return out.view(shape)


def extremes(x):  # noqa: ANN001, ANN201
    if x.dtype not in FLOATS or not x.numel() or (library := library_for(x.numel())) is None:
        return NotImplemented
    x, found = in_memory_order(x).contiguous(), torch.empty(2, dtype=torch.float32, device="cpu")
    library.extremes(x.data_ptr(), KINDS[x.dtype], x.numel(), found.data_ptr())
    return found


def count_nonfinite(x, nonfinite):  # noqa: ANN001, ANN201
    found = extremes(x)
    if found is NotImplemented:
        return NotImplemented
    raise_counter(nonfinite, int(found[0].isnan()))
    return None


def pack_flags(x, low, high):  # noqa: ANN001, ANN201
    x = x.view(torch.uint8) if x.dtype == torch.bool else x
    if x.dtype not in KINDS or not x.numel() or (library := library_for(x.numel())) is None:
        return NotImplemented
    x, n = x.contiguous(), x.numel()
    bits = torch.empty(codes_nbytes(n, COLS, 1), dtype=torch.uint8)
    limits = low, 0.0 if high is None else high, high is not None
    library.flags(x.data_ptr(), KINDS[x.dtype], n, *limits, bits.data_ptr())
    return bits


def two_valued(x: Tensor, value: float) -> Tensor | None:
    """The bitmap of what is not 0, if every value of `x` (contiguous, on a CPU) is 0 or `value`, else None."""
    library = library_for(x.numel()) if x.dtype in FLOATS and x.numel() else None
    if library is None:
        there = x != 0
        return torch.ops.actcompress.pack_flags(there, 0.0, None) if bool((~there | (x == value)).all()) else None
    bits = torch.empty(codes_nbytes(x.numel(), COLS, 1), dtype=torch.uint8)
    strange = library.two_flags(x.data_ptr(), KINDS[x.dtype], x.numel(), value, bits.data_ptr())
    return None if strange else bits


def decode_table(codes, table, shape, bits):  # noqa: ANN001, ANN201
    n = math.prod(shape)
    if table.dtype not in KINDS or bits > 8 or not n or (library := library_for(n)) is None:
        return NotImplemented
    check("codes", codes.nbytes, codes_nbytes(n, COLS, bits))
    check("table", table.numel(), 2**bits)
    codes, values, out = codes.contiguous(), table.float().contiguous(), flat_tensor(n, table.dtype)
    library.table_values(codes.data_ptr(), bits, n, COLS, values.data_ptr(), KINDS[table.dtype], out.data_ptr())
    return out.view(shape)
