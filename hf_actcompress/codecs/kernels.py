"""The arithmetic of the codecs as pure functions of tensors, for `compiled.Kernel`.

Shapes: a tensor is a grid x [N, K, C] of groups of C elements.  What belongs to a group is [N, K, ...]; tables that
repeat over N (the features of a period of the tensor) are [K, C].  Only elementwise operations, minima and maxima:
they give the same bits compiled and eager.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .compiled import Kernel
from .levels import ceil16, floor16, safe_inverse
from .packing import code_dtype, pack, pack_runs, unpack_parts
from .rounding import noise

SELECTED = 4  # bits up to which a table is looked up by choices
RUN = 16  # columns that a small matrix turns; the lanes of a vector register


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _rounded(y: Tensor, top: int, starts: Tensor | None, lanes: Tensor | None, key: Tensor | None) -> Tensor:
    """y in units of the step -> whole numbers 0 .. top (fp32); stochastic where a key is given."""
    if key is None:
        return torch.round(y).clamp(0, top)
    return torch.floor(y + noise(starts + lanes, key)).clamp(0, top)


def _units(x: Tensor, mean: Tensor | None, inverse: Tensor | None) -> Tensor:
    return x.float() if mean is None else (x.float() - mean) * inverse


def _group_codes(x, starts, mean, inverse, lanes, key, bits, clip, stored):  # noqa: ANN001, ANN202
    """(codes fp32 [N, K, C], minimum [N, K], step [N, K])"""
    y, top = _units(x, mean, inverse), 2**bits - 1
    lo, hi = y.amin(-1), y.amax(-1)
    if clip < 1:
        cut = (hi - lo) * ((1 - clip) / 2)
        lo, hi = lo + cut, hi - cut
    lo = floor16(lo) if stored == 16 else lo
    # Not hi - lo, which could overflow; not a division, which takes longer than all the rest of a group.
    step = hi * (1 / top) - lo * (1 / top)
    step = ceil16(step) if stored == 16 else step
    codes = _rounded((y - lo[..., None]) * safe_inverse(step)[..., None], top, starts, lanes, key)
    return codes, lo, step


def _group_encode(
    x: Tensor, starts: Tensor | None, mean: Tensor | None, inverse: Tensor | None, lanes: Tensor | None,
    key: Tensor | None, *, bits: int, clip: float, stored: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Groups with their own minimum and step: x -> codes uint8 [N, K, C * bits / 8], scales [N, K, 2].

    starts: int32 [N, K, 1], index of each group's first element; lanes: int32 [C], 0, 1, ...; key: int32 [].
    """
    codes, lo, step = _group_codes(x, starts, mean, inverse, lanes, key, bits, clip, stored)
    return pack(codes.to(code_dtype(bits)), bits), torch.stack([lo, step], -1)


def _group_decode(
    codes: Tensor, scales: Tensor, mean: Tensor | None, root: Tensor | None, *, bits: int, dtype: torch.dtype
) -> tuple[Tensor]:
    lo, step = scales[..., :1].float(), scales[..., 1:].float()
    out = []
    for at, part in unpack_parts(codes, bits, codes.shape[-1] * 8 // bits):
        y = lo + part.float() * step
        out.append((y if mean is None else y * root[:, at] + mean[:, at]).to(dtype))
    return (_joined(out),)


def _group_roundtrip(
    x: Tensor, starts: Tensor | None, mean: Tensor | None, inverse: Tensor | None, root: Tensor | None,
    lanes: Tensor | None, key: Tensor | None, *, bits: int, clip: float, stored: int,
) -> tuple[Tensor]:  # fmt: skip
    codes, lo, step = _group_codes(x, starts, mean, inverse, lanes, key, bits, clip, stored)
    y = lo[..., None] + codes * step[..., None]
    return ((y if mean is None else y * root + mean).to(x.dtype),)


def _line_codes(x, starts, scale, lanes, key, bits):  # noqa: ANN001, ANN202
    y = (x.float() - scale[0]) * safe_inverse(scale[1])
    return _rounded(y, 2**bits - 1, starts, lanes, key)


def _line_encode(
    x: Tensor, starts: Tensor | None, scale: Tensor, lanes: Tensor | None, key: Tensor | None, *, bits: int
) -> tuple[Tensor]:
    """One minimum and step for all: scale fp32 [2]."""
    return (pack(_line_codes(x, starts, scale, lanes, key, bits).to(code_dtype(bits)), bits),)


def _line_decode(codes: Tensor, scale: Tensor, *, bits: int, dtype: torch.dtype) -> tuple[Tensor]:
    runs = unpack_parts(codes, bits, codes.shape[-1] * 8 // bits)
    return (_joined([(scale[0] + run.float() * scale[1]).to(dtype) for _, run in runs]),)


def _line_roundtrip(
    x: Tensor, starts: Tensor | None, scale: Tensor, lanes: Tensor | None, key: Tensor | None, *, bits: int
) -> tuple[Tensor]:
    return ((scale[0] + _line_codes(x, starts, scale, lanes, key, bits) * scale[1]).to(x.dtype),)


def _chosen(x: Tensor, edges: Tensor, right: bool, *columns: Tensor) -> list[Tensor]:
    """For each value the entry of every column at the number of edges below it (right: or equal to it)."""
    if not torch.compiler.is_compiling():
        index = torch.bucketize(x.contiguous(), edges, out_int32=True, right=right)
        return [column[index] for column in columns]
    # Few edges: a chain of comparisons stays in registers, a search or a gather does not vectorise.
    found = [column[0] for column in columns]
    for i in range(edges.shape[0]):
        above = x >= edges[i] if right else x > edges[i]
        found = [torch.where(above, column[i + 1], value) for column, value in zip(columns, found, strict=True)]
    return found


def _sort_encode(
    x: Tensor, edges: Tensor, scales: Tensor, inverse: Tensor, offsets: Tensor, *, bits: int, splits: int
) -> tuple[Tensor]:
    """Values to groups by edges fp32 [G - 1], then in steps of scales fp32 [G, 2]; offsets: fp32 code of each group's
    first value."""
    y = x.float()
    lo, inv, offset = _chosen(y, edges, True, scales[:, 0], inverse, offsets)
    inner = torch.round((y - lo) * inv).clamp(0, 2 ** (bits - splits) - 1)
    return (pack((inner + offset).to(code_dtype(bits)), bits),)


def _sort_roundtrip(
    x: Tensor, edges: Tensor, scales: Tensor, inverse: Tensor, *, bits: int, splits: int
) -> tuple[Tensor]:
    y = x.float()
    lo, step, inv = _chosen(y, edges, True, scales[:, 0], scales[:, 1], inverse)
    inner = torch.round((y - lo) * inv).clamp(0, 2 ** (bits - splits) - 1)
    return ((lo + inner * step).to(x.dtype),)


def _sort_decode(codes: Tensor, scales: Tensor, *, bits: int, splits: int, dtype: torch.dtype) -> tuple[Tensor]:
    """Codes of a group (high bits) and of a step in it, by scales fp32 [G, 2] (minimum, step)."""
    inner, out = bits - splits, []
    for _, run in unpack_parts(codes, bits, codes.shape[-1] * 8 // bits):
        group, step = run.int() >> inner, (run.int() & (2**inner - 1)).float()
        lo, width = scales[0, 0], scales[0, 1]
        for g in range(1, 2**splits):
            above = group >= g
            lo, width = torch.where(above, scales[g, 0], lo), torch.where(above, scales[g, 1], width)
        out.append((lo + step * width).to(dtype))
    return (_joined(out),)


def _nearest_encode(x: Tensor, edges: Tensor, ranks: Tensor, *, bits: int) -> tuple[Tensor]:
    """Codes by edges fp32 [k - 1] between neighbouring centroids; ranks: 0, 1, ... as fp32 [k]."""
    return (pack(_chosen(x.float(), edges, False, ranks)[0].to(code_dtype(bits)), bits),)


def _nearest_roundtrip(x: Tensor, edges: Tensor, table: Tensor) -> tuple[Tensor]:
    return (_chosen(x.float(), edges, False, table)[0].to(x.dtype),)


def _looked_up(table: Tensor, codes: Tensor, bits: int) -> Tensor:
    """table[codes]"""
    if bits > SELECTED or not torch.compiler.is_compiling():
        return table[codes.int()]
    # A gather does not vectorise: bit by bit, half of the entries that are left is dropped.
    codes, left = codes.int(), [table[i] for i in range(2**bits)]
    for k in range(bits):
        there = (codes >> k) & 1 != 0
        left = [torch.where(there, left[i + 1], left[i]) for i in range(0, len(left), 2)]
    return left[0]


def _table_decode(codes: Tensor, table: Tensor, *, bits: int) -> tuple[Tensor]:
    """table [2**bits] in the dtype of the result."""
    runs = unpack_parts(codes, bits, codes.shape[-1] * 8 // bits)
    return (_joined([_looked_up(table, run, bits) for _, run in runs]),)


def _equalized(x: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor]:
    return (_units(x, mean, inverse),)


def _signed(x: Tensor, mean: Tensor | None, inverse: Tensor | None, signs: Tensor) -> tuple[Tensor]:
    """The same (in fp32 without tables) times signs [C]."""
    return (_units(x, mean, inverse) * signs,)


def _restored(
    y: Tensor, center: Tensor, mean: Tensor | None, root: Tensor | None, *, dtype: torch.dtype
) -> tuple[Tensor]:
    """fp32 groups around 0 and their means [N, K, 1] -> the tensor's own values."""
    y = y + center
    return ((y if mean is None else y * root + mean).to(dtype),)


def _between_runs(x: Tensor) -> list[Tensor]:
    """Sums and differences between the runs of RUN columns of fp32 [N, K, C], as in a Walsh-Hadamard transform."""
    runs = [x[..., i : i + RUN] for i in range(0, x.shape[-1], RUN)]
    half = 1
    while half < len(runs):
        for i in range(len(runs)):
            if not i & half:
                runs[i], runs[i + half] = runs[i] + runs[i + half], runs[i] - runs[i + half]
        half *= 2
    return runs


def _butterflies(x: Tensor, signs: Tensor | None) -> tuple[Tensor]:
    """The second half of a rotation, or with signs [C] of its inverse."""
    runs = _between_runs(x)
    if signs is not None:
        runs = [run * signs[i * RUN : (i + 1) * RUN] for i, run in enumerate(runs)]
    return (_joined(runs),)


def _butterflies_restored(
    x: Tensor, center: Tensor, step: Tensor | None, mean: Tensor | None, root: Tensor | None, signs: Tensor, *,
    dtype: torch.dtype,
) -> tuple[Tensor]:  # fmt: skip
    """The same, times step [N, K, 1], and then what `restored` does."""
    out = []
    for i, run in enumerate(_between_runs(x.float())):
        at = slice(i * RUN, (i + 1) * RUN)
        y = (run if step is None else run * step) * signs[at] + center
        out.append((y if mean is None else y * root[:, at] + mean[:, at]).to(dtype))
    return (_joined(out),)


def _butterflies_steps(
    x: Tensor, center: Tensor, starts: Tensor | None, ones: Tensor, lanes: Tensor | None, key: Tensor | None, *,
    bits: int, reach: float, stored: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The second half of a rotation, and its codes in equal steps: codes, step [N, K, 1].

    center: [N, K, 1], taken out of the groups after they are turned; ones: [C], what a group of ones is turned to.
    reach: the step over the largest magnitude.
    """
    runs = [run - center * ones[i * RUN : (i + 1) * RUN] for i, run in enumerate(_between_runs(x))]
    hi, lo = runs[0], runs[0]
    for run in runs[1:]:
        hi, lo = torch.maximum(hi, run), torch.minimum(lo, run)
    step = torch.maximum(hi.amax(-1, keepdim=True), -lo.amin(-1, keepdim=True)) * reach
    step = ceil16(step) if stored == 16 else step
    codes, top, inverse = [], 2**bits - 1, safe_inverse(step)
    for i, run in enumerate(runs):
        own = None if lanes is None else lanes[i * RUN : (i + 1) * RUN]
        codes.append(_rounded(run * inverse + top / 2, top, starts, own, key).to(code_dtype(bits)))
    return pack_runs(codes, bits), step


def _steps_encode(
    y: Tensor, step: Tensor, starts: Tensor | None, lanes: Tensor | None, key: Tensor | None, *, bits: int
) -> tuple[Tensor]:
    """Groups around 0 in equal steps [N, K, 1], half of the codes on each side."""
    top = 2**bits - 1
    codes = _rounded(y * safe_inverse(step) + top / 2, top, starts, lanes, key)
    return (pack(codes.to(code_dtype(bits)), bits),)


def _steps_decode(codes: Tensor, step: Tensor, *, bits: int) -> tuple[Tensor]:
    middle = (2**bits - 1) / 2
    runs = unpack_parts(codes, bits, codes.shape[-1] * 8 // bits)
    return (_joined([(run.float() - middle) * step for _, run in runs]),)


def _halves(codes: Tensor, *, bits: int) -> tuple[Tensor]:
    """Codes around 0, which are whole numbers and a half, in bf16: exact up to 8 bits."""
    middle = (2**bits - 1) / 2
    runs = unpack_parts(codes, bits, codes.shape[-1] * 8 // bits)
    return (_joined([(run.float() - middle).bfloat16() for _, run in runs]),)


def _levels_encode(y: Tensor, spread: Tensor, edges: Tensor, ranks: Tensor, *, bits: int) -> tuple[Tensor]:
    """Groups around 0 of deviations [N, K, 1] by edges fp32 [k - 1]; ranks: 0, 1, ... as fp32 [k]."""
    codes = _chosen(y * safe_inverse(spread), edges, False, ranks)[0]
    return (pack(codes.to(code_dtype(bits)), bits),)


def _levels_decode(codes: Tensor, spread: Tensor, table: Tensor, *, bits: int) -> tuple[Tensor]:
    runs = unpack_parts(codes, bits, codes.shape[-1] * 8 // bits)
    return (_joined([_looked_up(table, run, bits) * spread for _, run in runs]),)


def _float8_encode(x: Tensor, scale: Tensor, *, format: torch.dtype) -> tuple[Tensor]:
    """x / scale (fp32 []) in an 8-bit float, as bytes."""
    top = torch.finfo(format).max
    return ((x.float() / scale).clamp(-top, top).to(format).view(torch.uint8),)


def _float8_decode(codes: Tensor, scale: Tensor, *, format: torch.dtype, dtype: torch.dtype) -> tuple[Tensor]:
    return ((codes.view(format).float() * scale).to(dtype),)


def _float8_roundtrip(x: Tensor, scale: Tensor, *, format: torch.dtype) -> tuple[Tensor]:
    return _float8_decode(_float8_encode(x, scale, format=format)[0], scale, format=format, dtype=x.dtype)


def _bitmap(condition: Tensor) -> Tensor:
    """`pack` of one bit, in 32-bit integers: as many lanes as the comparisons of floats that it joins."""
    run = condition.shape[-1] // 8
    bits = torch.where(condition[..., :run], 1, 0).to(torch.int32)
    for k in range(1, 8):
        bits = bits | torch.where(condition[..., k * run : (k + 1) * run], 1 << k, 0).to(torch.int32)
    return bits.to(torch.uint8)


def _flags(x: Tensor, *, low: float, high: float | None) -> tuple[Tensor]:
    above = ~(x <= low)
    return (_bitmap(above if high is None else above & (x < high)),)


def _two_flags(x: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Bitmaps of what is not 0, and of what is neither 0 nor `value` []."""
    zero = x == 0
    return _bitmap(~zero), _bitmap(~(zero | (x == value)))


def _unflag(bits: Tensor, values: Tensor) -> tuple[Tensor]:
    """values [2]: for a bit that is not set, and for one that is."""
    # All eight at once: eight runs of bytes joined take eight times as long.
    shifts = torch.arange(8, dtype=torch.int32, device=bits.device).view(8, 1)
    there = (bits.to(torch.int32).unsqueeze(-2) >> shifts) & 1
    return (torch.where(there != 0, values[1], values[0]).flatten(-2),)


def _slope_encode(
    x: Tensor, starts: Tensor, lanes: Tensor, key: Tensor, *, function: str, bits: int, least: float, width: float
) -> tuple[Tensor]:
    """Slopes of an activation function at `x` in equal steps from `least` to `least + width`."""
    x = x.float()
    if function == "gelu":
        slope = 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(x * x * -0.5) * (2 * math.pi) ** -0.5
    elif function == "gelu_tanh":
        k = (2 / math.pi) ** 0.5
        t = torch.tanh(k * (x + 0.044715 * x * x * x))
        slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (k * (1 + 3 * 0.044715 * x * x))
    else:
        s = torch.sigmoid(x)
        slope = s * (1 + x * (1 - s))
    top = 2**bits - 1
    codes = _rounded((slope - least) * (top / width), top, starts, lanes, key)
    return (pack(codes.to(code_dtype(bits)), bits),)


def _band_bits(x: Tensor, lo: Tensor, hi: Tensor, *, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Bitmaps of the magnitudes from lo to hi, of those above hi (fp32 [], or fp64 for fp64), and of those that are
    NaN or beyond `limit`."""
    size = x.to(lo.dtype).abs()
    return _bitmap((size >= lo) & (size <= hi)), _bitmap(size > hi), _bitmap(~(size <= limit))


def _keep_above(x: Tensor, hi: Tensor) -> tuple[Tensor]:
    return (torch.where(x.to(hi.dtype).abs() > hi, x, torch.zeros_like(x)),)


def _place(bits: Tensor, ranks: Tensor, values: Tensor) -> tuple[Tensor]:
    """Bitmap [N, K, C / 8], for each byte the number of bits before it, values [k, 1] byte by byte -> [N, K, C]."""
    byte, out = bits.to(torch.int32), []
    for i in range(8):
        before = byte & ((1 << i) - 1)
        before = before - ((before >> 1) & 0x55)  # sums of neighbouring bits, pairs, halves
        before = (before & 0x33) + ((before >> 2) & 0x33)
        rank = ranks + ((before + (before >> 4)) & 0x0F)
        there = (byte >> i) & 1 != 0
        value = values[torch.where(there, rank, 0), 0]
        out.append(torch.where(there, value, torch.zeros_like(value)))
    return (_joined(out),)


group_encode, group_decode, group_roundtrip = Kernel(_group_encode), Kernel(_group_decode), Kernel(_group_roundtrip)
line_encode, line_decode, line_roundtrip = Kernel(_line_encode), Kernel(_line_decode), Kernel(_line_roundtrip)
sort_encode, sort_decode, sort_roundtrip = Kernel(_sort_encode), Kernel(_sort_decode), Kernel(_sort_roundtrip)
nearest_encode, nearest_roundtrip = Kernel(_nearest_encode), Kernel(_nearest_roundtrip)
table_decode = Kernel(_table_decode)
keep_above, band_bits, place = Kernel(_keep_above), Kernel(_band_bits), Kernel(_place)
equalized, signed, restored = Kernel(_equalized), Kernel(_signed), Kernel(_restored)
steps_encode, steps_decode, halves = Kernel(_steps_encode), Kernel(_steps_decode), Kernel(_halves)
levels_encode, levels_decode = Kernel(_levels_encode), Kernel(_levels_decode)
flags, two_flags, unflag, slope_encode = Kernel(_flags), Kernel(_two_flags), Kernel(_unflag), Kernel(_slope_encode)
float8_encode, float8_decode, float8_roundtrip = (
    Kernel(_float8_encode), Kernel(_float8_decode), Kernel(_float8_roundtrip),
)  # fmt: skip
butterflies = Kernel(_butterflies)
butterflies_restored, butterflies_steps = Kernel(_butterflies_restored), Kernel(_butterflies_steps)
