"""The C++ library of the operators: compiled once for a machine's processor, and kept in the user's own cache folder.

Without a compiler, or where no folder can be trusted, there is none, which is said once: then plain torch computes.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = [Path(__file__).with_name(name) for name in (
    "native.cpp", "native_decode.cpp", "native_rotated.cpp", "native_selection.cpp", "native_tables.cpp",
)]  # fmt: skip
HEADERS = [Path(__file__).with_name(name) for name in ("native.h", "native_levels.h")]
FLAGS = ("-O2", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off",
         "-fno-trapping-math", "-fno-math-errno")  # fmt: skip
SMALLEST = 1 << 12  # elements; nothing is compiled for smaller tensors

_p, _i, _n, _u, _f = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint32, ctypes.c_float
SIGNATURES: dict[str, tuple] = {  # name: result, arguments
    "group_codes": (_n, _p, _i, _i, _i, _p, _p, _p, _p, _n, _n, _i, _u, _p, _p, _p),
    "planes_roundtrip": (_n, _p, _i, _i, _i, _n, _n, _i, _i, _u, _p),
    "extremes": (None, _p, _i, _n, _p),
    "flags": (None, _p, _i, _n, _f, _f, _i, _p),
    "two_flags": (_i, _p, _i, _n, _f, _p),
    "select_largest": (None, _p, _i, _n, _n, _p, _p, _i),
    "keep_largest": (_i, _p, _i, _n, _n, _i, _p),
    "place_values": (None, _p, _n, _i, _p, _n, _p),
    "sorted_codes": (None, _p, _i, _n, _p, _p, _p, _p, _i, _i, _p, _p),
    "group_values": (None, _p, _i, _p, _i, _i, _p, _p, _n, _n, _i, _i, _p),
    "rotated_codes": (_n, _p, _i, _p, _p, _p, _n, _n, _i, _i, _i, _i, _p, _p, _p, _p, _p, _p, _p, _p),
    "rotated_values": (None, _p, _p, _p, _p, _n, _n, _i, _i, _i, _i, _p, _p, _p, _i, _p),
    "table_values": (None, _p, _i, _n, _i, _p, _i, _p),
}


def _compiler() -> str | None:
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name]
    return next((path for path in map(shutil.which, names) if path), None)


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
    text = "".join(path.read_text() for path in (*HEADERS, *SOURCES))
    text += _processor() + str(_compiler()) + " ".join(FLAGS)
    return folder / f"native_{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"


def _private_folder() -> Path:
    """`hf_actcompress` in the user's cache folder, mode 0700.

    What lies there is loaded and run, so nobody else may be able to put anything there.  Raises OSError where that
    is not sure.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # as the XDG specification has it: neither ~ nor a path from wherever we are
        cache = Path.home() / ".cache"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache.resolve(strict=True) / "hf_actcompress"
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

    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes of this user wait for the one that compiles
        if os.path.lexists(target):
            return
        logger.warning("Compiling the kernels of the codecs into %s, once on this machine, for some seconds",
                       target.parent)  # fmt: skip
        with tempfile.TemporaryDirectory(dir=target.parent) as folder, ThreadPoolExecutor() as pool:
            objects = [Path(folder) / f"{source.stem}.o" for source in SOURCES]
            list(pool.map(lambda source, made: run("-c", source, "-o", made), SOURCES, objects))
            whole = Path(folder) / target.name
            run("-shared", *objects, "-o", whole)
            os.replace(whole, target)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library, compiled if need be."""
    compiler = _compiler()
    if compiler is None:
        logger.warning("There is no C++ compiler (CXX, g++, clang++, c++): codecs run in plain torch, which is slower")
    target = None if compiler is None else _target()
    if target is None:
        return None
    try:
        if not os.path.lexists(target):
            _build(compiler, target)
        if not _is_private(target):
            raise PermissionError(f"{target} is a link, or others may change it: delete it")
        library = ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        text = (getattr(error, "stderr", b"") or b"").decode(errors="replace")
        logger.warning("Codecs run without their native kernels (%s) %s", error, text[-500:])
        return None
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


def library_for(n: int) -> ctypes.CDLL | None:
    """The library, for tensors of n elements; a small one alone is no reason to compile it."""
    return _library() if n >= SMALLEST or _library.cache_info().currsize else None
