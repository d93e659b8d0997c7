"""8-bit floating point numbers (ops/float8.py), by the bits of fp32: what a GPU of 2020 can do as well."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import FLOATS, is_wide, launch, to_kind

BLOCK = 2048


@triton.jit
def _to_code(y, E4M3: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """fp32 within the format's range -> its byte, rounded to nearest, ties to even; NaN stays NaN."""
    MANTISSA: tl.constexpr = 3 if E4M3 else 2  # noqa: N806
    BIAS: tl.constexpr = 7 if E4M3 else 15  # noqa: N806
    TOP: tl.constexpr = 448.0 if E4M3 else 57344.0  # noqa: N806
    NAN: tl.constexpr = 0x7F  # noqa: N806
    bits = y.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum(tl.abs(y), TOP)
    own = size.to(tl.int32, bitcast=True)
    SHIFT: tl.constexpr = 23 - MANTISSA  # noqa: N806
    normal = (own + ((1 << (SHIFT - 1)) - 1) + ((own >> SHIFT) & 1)) >> SHIFT
    normal = normal - ((127 - BIAS) << MANTISSA)
    # Below the smallest normal number steps are equal: adding 2**k makes fp32 round to them.
    MAGIC: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)  # noqa: N806
    small = (size + MAGIC).to(tl.int32, bitcast=True) - ((127 + 24 - BIAS - MANTISSA) << 23)
    LEAST: tl.constexpr = 2.0 ** (1 - BIAS)  # noqa: N806
    code = tl.where(size < LEAST, small, normal)
    return tl.where(y != y, NAN, code) | sign


@triton.jit
def _of_code(code, E4M3: tl.constexpr):  # noqa: ANN001, ANN202, N803
    MANTISSA: tl.constexpr = 3 if E4M3 else 2  # noqa: N806
    BIAS: tl.constexpr = 7 if E4M3 else 15  # noqa: N806
    rest = code & 0x7F
    normal = ((rest + ((127 - BIAS) << MANTISSA)) << (23 - MANTISSA)).to(tl.float32, bitcast=True)
    LEAST: tl.constexpr = 2.0 ** (1 - BIAS - MANTISSA)  # noqa: N806
    value = tl.where(rest < (1 << MANTISSA), rest.to(tl.float32) * LEAST, normal)
    if E4M3:
        value = tl.where(rest == 0x7F, float("nan"), value)
    else:
        value = tl.where(rest == 0x7C, float("inf"), tl.where(rest > 0x7C, float("nan"), value))
    return tl.where((code & 0x80) != 0, -value, value)


@triton.jit
def _float8(  # noqa: ANN202
    x, scale, codes, out, n, E4M3: tl.constexpr, ENCODE: tl.constexpr, DECODE: tl.constexpr, WIDE: tl.constexpr,  # noqa: ANN001, N803
):  # fmt: skip
    at = tl.program_id(0) * 2048 + tl.arange(0, 2048)
    if WIDE:
        at = tl.program_id(0).to(tl.int64) * 2048 + tl.arange(0, 2048)
    unit = tl.load(scale)
    if ENCODE:
        y = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
        code = _to_code(tl.div_rn(y, unit + y * 0.0), E4M3)
        if not DECODE:
            tl.store(codes + at, code.to(tl.uint8), mask=at < n)
    else:
        code = tl.load(codes + at, mask=at < n, other=0).to(tl.int32)
    if DECODE:
        tl.store(out + at, to_kind(_of_code(code, E4M3) * unit, out), mask=at < n)


def _launch(device, x, scale, codes, out, n, format) -> None:  # noqa: ANN001
    launch(_float8, -(-n // BLOCK), device, x, scale[-1:], codes, out, n, E4M3=format == "e4m3", ENCODE=x is not None,
           DECODE=out is not None, WIDE=is_wide(n))  # fmt: skip


def encode(x, scale, format):  # noqa: ANN001, ANN201
    if x.dtype not in FLOATS or not x.numel():
        return NotImplemented
    codes = x.new_empty(x.numel(), dtype=torch.uint8)
    _launch(x.device, x.contiguous(), scale, codes, None, x.numel(), format)
    return codes


def decode(codes, scale, shape, dtype, format):  # noqa: ANN001, ANN201
    if dtype not in FLOATS or not codes.numel():
        return NotImplemented
    out = codes.new_empty(shape, dtype=dtype)
    _launch(codes.device, None, scale, codes.contiguous(), out, codes.numel(), format)
    return out


def roundtrip(x, scale, format):  # noqa: ANN001, ANN201
    if x.dtype not in FLOATS or not x.numel():
        return NotImplemented
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x.device, x.contiguous(), scale, None, out, x.numel(), format)
    return out if x.is_contiguous() else torch.empty_like(x).copy_(out)
