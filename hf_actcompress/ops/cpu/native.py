"""The few operators that are written in C++, where a compiled one reads memory twice or calls a slow library.

The `native*.cpp` in this folder are compiled once for a machine's processor, when enough work is there for them, and
kept in the user's own cache folder.  They give the bits of the functions of quantize.py and
bitmaps.py that they stand in for, and are switched by the same variable, HF_ACTCOMPRESS_COMPILE.
Without a compiler, or for a tensor that they do not take, the functions here return None.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ..compiled import SMALLEST, compiler_for, policy
from ..memory import fresh

logger = logging.getLogger(__name__)

SOURCES = [Path(__file__).with_name(name) for name in ("native.cpp", "native_decode.cpp", "native_slopes.cpp")]
HEADER = Path(__file__).with_name("native.h")
FLAGS = ("-O2", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off",
         "-fno-trapping-math", "-fno-math-errno")  # fmt: skip
PATIENCE = 1 << 28  # elements that could have been served before a first compilation, which takes five to ten seconds
LARGEST = 1024  # columns of a group
BITS = (1, 2, 3, 4, 5, 6, 8)
FUNCTIONS = ("gelu", "gelu_tanh", "silu")

_served = 0


def _processor() -> str:
    """What -march=native depends on."""
    try:
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor()


@functools.cache
def _target() -> Path | None:
    """Where the library for this source and processor is kept; None, said once, where no place can be trusted."""
    try:
        folder = _private_folder()
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        logger.warning("Codecs run without their native kernels: there is no private folder to keep them (%s)", error)
        return None
    text = "".join(path.read_text() for path in (HEADER, *SOURCES))
    text += _processor() + str(compiler_for("cpu")) + " ".join(FLAGS)
    return folder / f"native_{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"


def _private_folder() -> Path:
    """`hf_actcompress` in the user's cache folder, mode 0700.

    What lies there is loaded and run, so nobody else may be able to put anything there.  Raises OSError where that
    is not sure.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    Path(cache).mkdir(parents=True, exist_ok=True)
    folder = Path(cache).resolve(strict=True) / "hf_actcompress"
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
        raise PermissionError(f"{folder} is a link, or belongs to another user")
    folder.chmod(0o700)
    for parent in folder.parents:  # whoever may rename one of these can put another folder in our place
        about = parent.lstat()
        shared = about.st_mode & 0o022 and not about.st_mode & stat.S_ISVTX
        if shared or about.st_uid not in (0, os.getuid()):
            raise PermissionError(f"other users may change {parent}")
    return folder


def _is_private(file: Path) -> bool:
    """Whether it is a plain file, of this user, that nobody else may change."""
    about = file.lstat()
    return stat.S_ISREG(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o022


def _build(compiler: str, target: Path) -> None:
    def run(*arguments: str | Path) -> None:
        subprocess.run([compiler, *FLAGS, *arguments], check=True, capture_output=True, timeout=600)

    with tempfile.TemporaryDirectory(dir=target.parent) as folder, ThreadPoolExecutor() as pool:
        objects = [Path(folder) / f"{source.stem}.o" for source in SOURCES]
        list(pool.map(lambda source, made: run("-c", source, "-o", made), SOURCES, objects))
        whole = Path(folder) / target.name
        run("-shared", *objects, "-o", whole)
        os.replace(whole, target)  # at once: other processes may look for it


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library, compiled if need be."""
    compiler = compiler_for("cpu") if platform.system() == "Linux" else None
    target = None if compiler is None else _target()
    if target is None:
        return None
    try:
        if not os.path.lexists(target):
            logger.warning("Compiling the native kernels of the codecs into %s, once, for some seconds", target.parent)
            _build(compiler, target)
        if not _is_private(target):
            raise PermissionError(f"{target} is a link, or others may change it: delete it")
        library = ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        text = (getattr(error, "stderr", b"") or b"").decode(errors="replace")
        logger.warning("Codecs run without their native kernels (%s) %s", error, text[-500:])
        return None
    p, i, n, u, f = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint32, ctypes.c_float
    library.group_codes.argtypes = [p, i, i, i, p, p, p, n, n, i, u, u, p, p, p]
    library.group_codes.restype = None
    library.planes_roundtrip.argtypes = [p, i, i, i, n, n, i, i, u, p]
    library.planes_roundtrip.restype = None
    library.slope_encode.argtypes = [p, i, i, i, n, i, f, f, u, u, p]
    library.slope_encode.restype = i
    library.two_flags.argtypes = [p, i, n, f, p]
    library.two_flags.restype = i
    library.flags.argtypes = [p, i, n, f, f, i, p]
    library.flags.restype = None
    library.reach.argtypes = [p, i, n, f]
    library.reach.restype = f
    library.group_values.argtypes = [p, i, p, i, p, p, n, n, i, i, p]
    library.group_values.restype = None
    library.table_values.argtypes = [p, i, n, i, p, i, p]
    library.table_values.restype = None
    return library


def _ready(x: Tensor, bits: int) -> ctypes.CDLL | None:
    """The library, if it takes `x` [N, K, C] and the policy allows it."""
    fits = x.dtype in (torch.float32, torch.bfloat16) and x.is_contiguous()
    return _chosen(x.numel(), x.shape[-1], bits, x.device) if fits else None


def _chosen(n: int, cols: int, bits: int, device: torch.device) -> ctypes.CDLL | None:
    """The library for `n` values in rows of `cols`."""
    fits = bits in BITS and cols % 16 == 0 and cols <= LARGEST and (n >= SMALLEST or policy() == "1")
    return _allowed(n, device) if fits else None


def _allowed(n: int, device: torch.device) -> ctypes.CDLL | None:
    """The library, if the policy allows it on this device; until enough of it was needed, only if it is there."""
    global _served
    chosen = policy()
    if chosen == "0" or device.type != "cpu" or torch.compiler.is_compiling():
        return None
    if chosen == "auto" and _served < PATIENCE and ((target := _target()) is None or not os.path.lexists(target)):
        _served += n
        return None
    return _library()


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _check(what: str, have: int, needed: int, codes: Tensor) -> None:
    """No pointer is handed out to less than the library reads."""
    if have != needed or codes.dtype != torch.uint8:
        raise ValueError(f"{what}: {have} numbers for codes of {codes.dtype} that need {needed}: damaged payload.")


def group_encode(
    x: Tensor, start: int, mean: Tensor | None, inverse: Tensor | None, key: int | None, *, bits: int,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """`quantize.group_encode` for x [N, K, C] whose groups count from `start` on: codes, scales; or None.

    Scales are in bf16 already.
    """
    library = _ready(x, bits)
    if library is None:
        return None
    codes = torch.empty(*x.shape[:2], x.shape[2] * bits // 8, dtype=torch.uint8)
    scales = torch.empty(*x.shape[:2], 2, dtype=torch.bfloat16)
    _group_codes(library, x, start, (mean, inverse, None), key, bits, (codes, scales, None))
    return codes, scales


def group_roundtrip(
    x: Tensor, start: int, mean: Tensor | None, inverse: Tensor | None, root: Tensor | None, key: int | None, *,
    bits: int,
) -> Tensor | None:  # fmt: skip
    """`quantize.group_roundtrip`, likewise: what is decoded, as `x`; or None."""
    library = _ready(x, bits)
    if library is None:
        return None
    out = fresh(x.numel(), x.dtype, x.device).view(x.shape)
    _group_codes(library, x, start, (mean, inverse, root), key, bits, (None, None, out))
    return out


def planes_roundtrip(x: Tensor, cols: int, key: int | None, *, bits: int) -> Tensor | None:
    """Roundtrip of images [B, C, H, W] that lie with channels last, by groups of `cols` pixels of a channel; as `x`.

    None where this is not for it: then they are to be brought to the order of the shape first.
    """
    if x.dim() != 4 or x.shape[1] % 16 or x.shape[2] * x.shape[3] % cols or x.is_contiguous():
        return None
    lying = x.permute(0, 2, 3, 1)
    if not lying.is_contiguous() or (library := _ready(lying.view(-1, 1, cols), bits)) is None:
        return None
    out, (images, channels, *_) = fresh(x.numel(), x.dtype, x.device).view(lying.shape).permute(0, 3, 1, 2), x.shape
    library.planes_roundtrip(
        x.data_ptr(), x.dtype == torch.bfloat16, key is not None, bits, images, x.shape[2] * x.shape[3], channels,
        cols, (key or 0) & 0xFFFFFFFF, out.data_ptr(),
    )  # fmt: skip
    return out


def _group_codes(
    library: ctypes.CDLL, x: Tensor, start: int, tables: tuple[Tensor | None, ...], key: int | None, bits: int,
    results: tuple[Tensor | None, ...],
) -> None:  # fmt: skip
    n, k, c = x.shape
    tables = tuple(None if t is None else t.contiguous() for t in tables)
    library.group_codes(
        x.data_ptr(), x.dtype == torch.bfloat16, key is not None, bits, *map(_address, tables), k, n * k, c,
        start & 0xFFFFFFFF, (key or 0) & 0xFFFFFFFF, *map(_address, results),
    )  # fmt: skip


def slope_encode(
    x: Tensor, start: int, key: int, *, function: str, bits: int, least: float, width: float
) -> tuple[Tensor, bool] | None:
    """`bitmaps.slope_encode` for x [N, 1, C]: codes, and whether all of `x` is finite; or None."""
    library = _ready(x, bits)
    if library is None:
        return None
    codes = torch.empty(*x.shape[:2], x.shape[2] * bits // 8, dtype=torch.uint8)
    strange = library.slope_encode(
        x.data_ptr(), x.dtype == torch.bfloat16, FUNCTIONS.index(function), bits, x.shape[0] * x.shape[1], x.shape[2],
        least, (2**bits - 1) / width, start & 0xFFFFFFFF, key & 0xFFFFFFFF, codes.data_ptr(),
    )  # fmt: skip
    return codes, not strange


def two_flags(x: Tensor, value: float) -> tuple[Tensor, bool] | None:
    """`bitmaps.two_flags` for x [N, 1, 128]: the bitmap, and whether every value is 0 or `value`; or None."""
    library = _ready(x, 1) if x.shape[2] == 128 else None
    if library is None:
        return None
    bits = torch.empty(*x.shape[:2], x.shape[2] // 8, dtype=torch.uint8)
    strange = library.two_flags(x.data_ptr(), x.dtype == torch.bfloat16, x.shape[0], value, bits.data_ptr())
    return bits, not strange


def flags(x: Tensor, low: float, high: float | None) -> Tensor | None:
    """`bitmaps.flags` for x [N, 1, 128]: the bitmap; or None."""
    library = _ready(x, 1) if x.shape[2] == 128 else None
    if library is None:
        return None
    bits = torch.empty(*x.shape[:2], x.shape[2] // 8, dtype=torch.uint8)
    limits = low, 0.0 if high is None else high, high is not None
    library.flags(x.data_ptr(), x.dtype == torch.bfloat16, x.shape[0], *limits, bits.data_ptr())
    return bits


def reach(scales: Tensor, factor: float) -> float | None:
    """The largest |minimum| + step * factor of scales [G, 2] in fp32 or bf16, NaN if one is; or None."""
    if scales.dtype not in (torch.float32, torch.bfloat16) or not scales.is_contiguous() or not scales.numel():
        return None
    library = _allowed(len(scales), scales.device)  # however few: it stands for a handful of calls
    return None if library is None else library.reach(scales.data_ptr(), scales.dtype == torch.bfloat16,
                                                      len(scales), factor)  # fmt: skip


def group_decode(
    codes: Tensor, scales: Tensor, mean: Tensor | None, root: Tensor | None, *, bits: int, dtype: torch.dtype
) -> Tensor | None:
    """`quantize.group_decode` for codes [N, K, C * bits / 8]: values [N, K, C]; or None."""
    (n, k, _), cols = codes.shape, codes.shape[2] * 8 // bits
    if dtype not in (torch.float32, torch.bfloat16) or scales.dtype not in (torch.float32, torch.bfloat16):
        return None
    library = _chosen(n * k * cols, cols, bits, codes.device)
    if library is None:
        return None
    codes, scales = codes.contiguous(), scales.contiguous()
    _check("scales", scales.numel(), 2 * n * k, codes)
    tables = [None if t is None else t.contiguous() for t in (mean, root)]
    out = fresh(n * k * cols, dtype, codes.device)
    library.group_values(
        codes.data_ptr(), bits, scales.data_ptr(), scales.dtype == torch.bfloat16, *map(_address, tables), k, n * k,
        cols, dtype == torch.bfloat16, out.data_ptr(),
    )  # fmt: skip
    return out.view(n, k, cols)


def table_decode(codes: Tensor, table: Tensor, *, bits: int) -> Tensor | None:
    """`quantize.table_decode` for codes [N, K, C * bits / 8] and a table in fp32, bf16 or bytes; or None."""
    (n, k, _), cols = codes.shape, codes.shape[2] * 8 // bits
    if table.dtype not in (torch.float32, torch.bfloat16, torch.uint8):
        return None
    library = _chosen(n * k * cols, cols, bits, codes.device)
    if library is None:
        return None
    codes, values = codes.contiguous(), table.float().contiguous()
    _check("the table", values.numel(), 2**bits, codes)
    out = fresh(n * k * cols, table.dtype, codes.device)
    library.table_values(
        codes.data_ptr(), bits, n * k, cols, values.data_ptr(), table.dtype.itemsize, out.data_ptr()
    )  # fmt: skip
    return out.view(n, k, cols)
