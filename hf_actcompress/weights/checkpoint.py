"""Compressed models on disk: one safetensors file of about as many bytes as were counted.

The file holds one tensor of bytes, because a small model is not much longer than a header of many:

    values of 8 bytes, of 4, ..., packed codes | manifest, deflated JSON | its length (4 bytes) | CRC-32 of all before

The manifest names every tensor with shape and dtype, and how it is compressed.  What a file says is checked before
anything is allocated.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .compressed_form import CompressedForm
from .files import is_shape, some
from .restore import restore
from .scheme import Scheme, find_tasks
from .stream import Reader, Writer, dtype_of, name_of, whole

FILE_NAME = "compressed.safetensors"
TENSOR = "lc2"  # the format's version
LARGEST_MANIFEST = 1 << 26  # bytes, unpacked
# Words that manifests share: a small model's must be small, too.  The likeliest come last.
WORDS = (b'"binary"]],"ternary"]],["lowrank",["sum",["each",["codebook",16]]],["codebook",4],["codebook",2]]],'
         b'.0.1.2,"bfloat16"}}]},"c":[[[0],["sparse",1,500,16]],[[2],["sparse",7,1000,16]],[[4,6],["sparse",10,4]]],'
         b'"d":{"float32":600,"uint8":'
         b'{"t":{"conv1.weight":[16,1,3,3],"conv1.bias":[16],"conv2.weight":[32,16,5,5],"conv2.bias":[32],'
         b'"fc1.weight":[128,512],"fc1.bias":[128],"fc2.weight":[10,128],"fc2.bias":[10')  # fmt: skip


def count_bits(model: nn.Module) -> int:
    """Bits of all parameters and saved buffers as they are; shared ones count once."""
    return sum(8 * t.numel() * t.element_size() for t in _distinct(model)[0].values())


def _distinct(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state's tensors, and for each name that is another name of one of them, that one's."""
    found: dict[str, Tensor] = {}
    first: dict[Any, str] = {}
    aliases = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"The state of the model holds {name}, a {type(tensor).__name__}: it cannot be saved.")
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else name
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            found[name] = tensor.detach()
    return found, aliases


def save_compressed(
    model: nn.Module, folder: str | Path, compressed: Scheme | str | Sequence[tuple[Sequence[str], CompressedForm]], *,
    mu: float | None = None, structure: Any = None,
) -> Path:  # fmt: skip
    """Write `folder/compressed.safetensors` and return its path.

    compressed: what was learned (`LearningCompression.save` passes it), or a scheme: then the model's weights are
        compressed directly, and the model itself is left as it is.
    mu: for schemes with a penalty.
    structure: anything JSON can hold that is needed to build the model (pruned shapes); `read_manifest` returns it.
    """
    if isinstance(compressed, Sequence) and not isinstance(compressed, str):
        learned = [(tuple(names), form) for names, form in compressed]
    else:
        learned = [(t.names, t.compression.compress([model.get_parameter(n) for n in t.names], mu, names=t.names))
                   for t in find_tasks(model, compressed)]  # fmt: skip
    tensors, aliases = _distinct(model)
    index = {name: i for i, name in enumerate(tensors)}
    out = Writer()
    tasks = [[[index[name] for name in names], form.store(out)] for names, form in learned]
    done = {name for names, _ in learned for name in names}
    for name, tensor in tensors.items():
        if name not in done:
            out.put(tensor)
    # The widest first, so that each run lies at a multiple of its own size.
    streams = dict(sorted(out.joined().items(), key=lambda item: -item[1].element_size()))
    data = torch.cat([s.view(torch.uint8) if s.numel() else s.new_zeros(0, dtype=torch.uint8)
                      for s in streams.values()])  # fmt: skip
    about = {
        "t": {n: [*t.shape, *([] if t.dtype == torch.float32 else [name_of(t.dtype)])] for n, t in tensors.items()},
        "c": tasks, "d": {name: s.numel() for name, s in streams.items()},
    }  # fmt: skip
    about |= {"a": aliases} if aliases else {}
    about |= {"s": structure} if structure is not None else {}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{FILE_NAME}.tmp"
    save_file({TENSOR: _seal(data, about)}, unfinished)
    os.replace(unfinished, folder / FILE_NAME)  # by renaming, so that a crash leaves no half of a file
    return folder / FILE_NAME


def _seal(data: Tensor, about: dict[str, Any]) -> Tensor:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=WORDS)
    manifest = packer.compress(json.dumps(about, separators=(",", ":")).encode()) + packer.flush()
    manifest += struct.pack("<I", len(manifest))
    manifest += struct.pack("<I", zlib.crc32(manifest, zlib.crc32(data.numpy())))
    return torch.cat([data, torch.frombuffer(bytearray(manifest), dtype=torch.uint8)])


def _open(sealed: Tensor) -> tuple[Tensor, dict[str, Any]]:
    if sealed.dtype != torch.uint8 or sealed.dim() != 1 or len(sealed) < 8:
        raise ValueError(f"{TENSOR} is a {sealed.dtype} tensor of shape {tuple(sealed.shape)}")
    length, expected = struct.unpack("<II", sealed[-8:].numpy().tobytes())
    if zlib.crc32(sealed[:-4].numpy()) != expected:
        raise ValueError("its bytes do not match their checksum; copy or save it again")
    if length > len(sealed) - 8:
        raise ValueError(f"its manifest is said to have {length} bytes, and there are {len(sealed) - 8}")
    unpacker = zlib.decompressobj(-15, zdict=WORDS)
    text = unpacker.decompress(sealed[-8 - length : -8].numpy().tobytes(), LARGEST_MANIFEST)
    if unpacker.unconsumed_tail:
        raise ValueError(f"its manifest is longer than {LARGEST_MANIFEST} bytes")
    about = json.loads(text)
    if not isinstance(about, dict):
        raise ValueError("its manifest is no mapping")
    return sealed[: -8 - length], about


def load_compressed(folder: str | Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    """The state dict of a saved model, decompressed; loaded into `model` if one is given, wholly or not at all.

    Raises ValueError for a file that is missing, damaged or cut short, for one that does not fit the model, and for
    tensors that are larger than this machine's memory.
    """
    path, about, data = _read(folder)
    try:
        declared = _declared(about)
        if model is not None:
            _check(path, declared, model)
        state = _decompress(about, data)
    except _Misfit as error:
        raise ValueError(str(error)) from None
    except (ValueError, LookupError, ArithmeticError, TypeError, RuntimeError, AttributeError, MemoryError) as error:
        raise ValueError(f"{path} is damaged: its manifest does not fit its data ({error}).") from error
    if model is not None:
        model.load_state_dict(state)
    return state


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What a saved model holds, in words: `tensors` (name -> shape and dtype), `compressed` (names and how),
    `structure`, as it was given."""
    path, about, _ = _read(folder)
    try:
        tensors = _declared(about)
        names = list(about["t"])
        tasks = [{"names": [names[i] for i in task], "stored": stored} for task, stored in about["c"]]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is damaged: its manifest cannot be read ({error}).") from error
    return {"tensors": {name: tensors[name] for name in names}, "compressed": tasks, "structure": about.get("s")}


def _read(folder: str | Path) -> tuple[Path, dict[str, Any], Tensor]:
    path = Path(folder)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"There is no compressed model at {path}; save_compressed writes {FILE_NAME}.")
    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
            if keys != [TENSOR]:
                raise ValueError(f"it holds {keys[:3]} where this package looks for {TENSOR}")
            data, about = _open(file.get_tensor(TENSOR))
    except (SafetensorError, OSError, zlib.error, struct.error, RecursionError, ValueError) as error:
        raise ValueError(f"{path} is no compressed model, or is damaged or cut short ({error}).") from error
    return path, about, data


def _declared(about: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor, other names of shared ones included, checked before any is made."""
    found, nbytes = {}, 0
    for name, entry in about["t"].items():
        shape, dtype = entry, torch.float32
        if entry and isinstance(entry[-1], str):
            shape, dtype = entry[:-1], dtype_of(entry[-1])
        if not is_shape(shape):
            raise ValueError(f"{name}: {entry!r} is no shape")
        found[name] = tuple(shape), dtype
        nbytes += math.prod(shape) * max(dtype.itemsize, 4)
    if nbytes > (memory := _memory()):
        largest = max(found, key=lambda name: math.prod(found[name][0]))
        raise ValueError(f"{largest} has the shape {found[largest][0]}; all tensors take {nbytes / 1e9:.3g} GB, and "
                         f"this machine has {memory / 1e9:.3g}")  # fmt: skip
    return found | {name: found[of] for name, of in about.get("a", {}).items()}


def _memory() -> int:
    """Bytes of this machine, where the system says so."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 1 << 40


def _streams(lengths: dict[str, Any], data: Tensor) -> dict[str, Tensor]:
    """The values of each dtype."""
    streams, start = {}, 0
    for name, count in lengths.items():
        dtype = dtype_of(name)
        most = (len(data) - start) // dtype.itemsize
        end = start + dtype.itemsize * whole(count, 0, most, f"number of {name} values")
        streams[name] = data[start:end].clone().view(dtype)
        start = end
    if start != len(data):
        raise ValueError(f"{len(data)} bytes of data where {start} are named")
    return streams


def _decompress(about: dict[str, Any], data: Tensor) -> dict[str, Tensor]:
    source, declared = Reader(_streams(about["d"], data)), _declared(about)
    names = list(about["t"])
    state: dict[str, Tensor] = {}
    for indices, stored in about["c"]:
        own = [names[whole(i, 0, len(names) - 1, "index of a tensor")] for i in indices]
        if set(own) & set(state) or len(set(own)) != len(own):
            raise ValueError(f"{some(own)}: compressed twice")
        try:
            form = restore(stored, [declared[name][0] for name in own], source)
            values = form.values()
        except (ValueError, RuntimeError, TypeError) as error:
            raise ValueError(f"{some(own)}: {error}") from error
        for name, value in zip(own, values, strict=True):
            state[name] = value.view(declared[name][0]).to(declared[name][1])
    for name in names:
        if name not in state:
            shape, dtype = declared[name]
            state[name] = source.take(math.prod(shape), name_of(dtype)).view(shape)
    source.finish()
    return {**{name: state[name] for name in names}, **{n: state[of] for n, of in about.get("a", {}).items()}}


class _Misfit(ValueError):
    """A file that is right, for another model."""


def _check(path: Path, declared: dict[str, tuple[tuple[int, ...], torch.dtype]], model: nn.Module) -> None:
    own = {name: (tuple(value.shape), value.dtype) for name, value in model.state_dict().items()}
    apart = sorted({*declared} ^ {*own})
    wrong = [f"{name} is only in the {'file' if name in declared else 'model'}" for name in apart]
    for name in sorted({*declared} & {*own}):
        if own[name] != declared[name]:
            ours, theirs = (f"{shape} {name_of(dtype)}" for shape, dtype in (own[name], declared[name]))
            wrong.append(f"{name} is {theirs} in the file and {ours} in the model")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise _Misfit(
            f"{path} does not fit the model: {'; '.join(wrong[:3])}{more}. Nothing was loaded. Build the model "
            "with the same configuration, or load_compressed(folder) without a model and look."
        )
