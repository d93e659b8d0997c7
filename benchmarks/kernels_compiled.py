"""Every Triton kernel compiled ahead of time, without a GPU, and the launches of every codec counted.

    python benchmarks/kernels_compiled.py
    python benchmarks/kernels_compiled.py --codecs block:bits=4 --dtypes float32 --targets 90 --results block.json

The codecs, and training steps with compression, run on tensors that have a device and no values.  Where an operator of
ours is called its Triton form runs, with `launch` replaced: the kernel is compiled for these arguments, as it would be
at run time, and not started.  So no kernel's arguments are described here.

Of each kernel: registers of a thread, bytes spilled (must be 0) and bytes of shared memory, as ptxas counts them.  Of
each codec: launches of encode, decode and roundtrip with a fresh state, kernels of ours and of torch.
Writes benchmarks/results/kernels_compiled.json; benchmarks/pages.py makes the tables of docs/gpu.md from it.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import hf_actcompress.ops.triton as kernels
from hf_actcompress import ActCompressConfig, compress_model, parse_codec
from hf_actcompress.ops.library import FORMS
from hf_actcompress.saved import passes

sys.path.append(str(harness.ROOT / "tests"))
from helpers.launches import backward, no_values  # noqa: E402

TARGETS = (80, 90)  # A100; H100 and H200
DTYPES = ("float32", "bfloat16", "float16")
TEXT = (32, 128, 384)
SHAPES = ((8, 64, 28, 28), (5, 1001), (1 << 22, 768))  # images, short groups, offsets of 64 bits; of FAMILIES
FAMILIES = ("block:bits=4", "uniform:bits=8", "float8", "rotated:bits=2", "kmeans:bits=4", "sort:bits=8",
            "topk:ratio=0.1")  # fmt: skip
CODECS = (
    "identity", *(f"block:bits={bits}" for bits in (8, 4, 3, 2)), "block:bits=4,round=stochastic",
    "block:bits=4,equalize=none", "uniform:bits=8", "uniform:bits=4,round=stochastic", "float8", "float8:format=e5m2",
    "rotated:bits=4", "rotated:bits=2", "trellis:bits=2", "kmeans:bits=4", "sort:bits=8", "topk:ratio=0.1", "sign",
    "lowrank:rank=8", "ef+block:bits=4",
)  # fmt: skip
STEPS = ("none", "identity", "block:bits=4", "rotated:bits=2", "saved block:bits=4", "saved block:bits=2")


class Launches(TorchDispatchMode):
    """Counts what would be launched on a GPU: the kernels of our operators, and operations of torch that compute."""

    def __init__(self, found: Callable[[str, Any, tuple, dict], None] = lambda *kernel: None) -> None:
        super().__init__()
        self.found = found
        self.ours = self.torch = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = func._schema.name.partition("::")[2], kwargs or {}
        forms = FORMS.get(name, {}) if func.namespace == "actcompress" else {}
        if not forms:
            self.torch += computes(func)
            return func(*args, **kwargs)
        result = NotImplemented
        with self:
            if "triton" in forms:
                with recorded(lambda *kernel: self._launched(name, *kernel)):
                    result = forms["triton"](*args, **kwargs)
            return forms["reference"](*args, **kwargs) if result is NotImplemented else result

    def _launched(self, name: str, kernel: Any, args: tuple, constants: dict[str, Any]) -> None:
        self.ours += 1
        self.found(name, kernel, args, constants)


def computes(func: Any) -> bool:
    """Whether an operation launches something: no view, no new memory alone, no question about a shape."""
    space, _, name = func._schema.name.partition("::")
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return not (space == "prim" or view or name.startswith(("empty", "new_empty", "sym_", "_unsafe_view")))


@contextlib.contextmanager
def recorded(found: Callable[[Any, tuple, dict], None]) -> Iterator[None]:
    """Kernels are handed to `found` instead of being launched."""

    def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **constants: Any) -> None:
        found(kernel, args, constants)

    with contextlib.ExitStack() as stack:
        for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
            module = importlib.import_module(module.name)
            if hasattr(module, "launch"):
                stack.enter_context(mock.patch.object(module, "launch", launch))
        stream = mock.Mock(cuda_stream=0)
        stack.enter_context(mock.patch.object(torch.cuda, "current_stream", lambda device=None: stream))
        yield


class Compiled:
    """The kernels that were met, each compiled for each target."""

    def __init__(self, targets: Iterable[int]) -> None:
        self.targets = targets
        self.rows: dict[str, dict[str, Any]] = {}
        self.seen: set[str] = set()

    def __call__(self, operator: str, kernel: Any, args: tuple, constants: dict[str, Any]) -> None:
        for target in self.targets:
            source, options, variant = specialized(kernel, args, constants, target)
            if (key := f"{source.hash()} {target}") in self.seen:
                continue
            self.seen.add(key)
            row = self.rows.setdefault(f"{kernel.__name__} {variant}", {"operators": [], "targets": {}})
            row["operators"] = sorted({*row["operators"], operator})
            known, found = row["targets"].get(f"sm_{target}", {}), usage(source, options, target)
            # Sizes that 16 divides, or that are 1, make kernels of their own: the most that one of them uses.
            row["targets"][f"sm_{target}"] = {name: max(value, known.get(name, 0)) for name, value in found.items()}
            if found["spilled"]:
                tqdm.write(f"{kernel.__name__} {variant}, sm_{target}: {found['spilled']} bytes are spilled")


def specialized(kernel: Any, args: tuple, constants: dict[str, Any], target: int) -> tuple[Any, dict, str]:
    """The kernel as Triton would compile it for these arguments at run time."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import MockTensor, create_function_from_signature

    from hf_actcompress.ops.triton.common import SETTINGS

    backend = make_backend(GPUTarget("cuda", target, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    args = tuple(MockTensor(a.dtype) if isinstance(a, torch.Tensor) else a for a in args)
    options = {**SETTINGS, "debug": False, "instrumentation_mode": ""}
    options |= {k: constants.pop(k) for k in list(constants) if k not in kernel.arg_names}
    bound, specialization, _ = bind(*args, **constants, **options)
    options, signature, constexprs, attributes = kernel._pack_args(backend, options, bound, specialization, None)
    kinds = dict.fromkeys(kind[1:] for kind in signature.values() if kind.startswith("*"))
    variant = " ".join([",".join(kinds), *(f"{name}={value}" for name, value in constants.items())])
    return ASTSource(kernel, signature, constexprs, attributes), options.__dict__, variant


def usage(source: Any, options: dict[str, Any], target: int) -> dict[str, int]:
    """Registers of a thread, bytes spilled and bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget

    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    fused = [] if options["enable_fp_fusion"] else ["--fmad=false"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        command = [ptxas, "-v", *fused, "--gpu-name", re.search(r"\.target (sm_\w+)", made.asm["ptx"])[1], file.name,
                   "-o", "/dev/null"]  # fmt: skip
        text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", text)[1]),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", text))),
        "shared": made.metadata.shared,
    }


def codec_launches(spec: str, shape: tuple[int, ...], dtype: torch.dtype, found: Callable) -> dict[str, Any]:
    """Launches (ours, torch's) of encode, decode and roundtrip with a fresh state."""
    codec, x = parse_codec(spec), torch.empty(shape, dtype=dtype, device="cuda")

    def run() -> dict[str, Launches]:
        with Launches(found) as encode:
            payload = codec.encode(x, codec.init_state("here"))
        with Launches(found) as decode:
            codec.decode(payload)
        with Launches(found) as roundtrip:
            codec.roundtrip(x, codec.init_state("here"))
        return {"encode": encode, "decode": decode, "roundtrip": roundtrip}

    run()  # tables that are made once
    return {way: [mode.ours, mode.torch] for way, mode in run().items()}


def step_launches(option: str, found: Callable) -> list[int]:
    """Launches (ours, torch's) of forward and backward of a BERT of 2 layers."""
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 1536}
    with torch.device("cuda"):
        model = BertForSequenceClassification(BertConfig(**shape)).train()
        ids = torch.zeros(32, 128, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids[:, 0].clone()}
    if option == "none":
        attached: Any = contextlib.nullcontext()
    elif option.startswith("saved "):
        attached = compress_model(model, ActCompressConfig(saved=option.removeprefix("saved ")))
    else:
        attached = compress_model(model, ActCompressConfig(option, first=1, last=1))
    with attached:
        backward(model(**batch).loss)  # samples for the log, tables that are made once
        model.zero_grad()
        with Launches(found) as mode:
            backward(model(**batch).loss)
    return [mode.ours, mode.torch]


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """A shape that a codec does not take, or a value that is read back, is written and ends nothing."""
    try:
        yield
    except (ValueError, ImportError, DataDependentOutputException) as error:
        tqdm.write(f"{what}: {type(error).__name__} {error}")


def main() -> None:
    parser = harness.arguments(__doc__, results="kernels_compiled")
    parser.add_argument("--codecs", nargs="*", default=CODECS)
    parser.add_argument("--steps", nargs="*", default=STEPS, help="none, a codec at two boundaries, or 'saved CODEC'")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES[:2], choices=DTYPES)
    parser.add_argument("--targets", nargs="+", type=int, default=TARGETS, help="compute capabilities, like 90")
    parser.add_argument("--count", action="store_true", help="count launches and compile nothing")
    args = parser.parse_args()
    compiled = Compiled([] if args.count else args.targets)
    calls = [(spec, TEXT, dtype) for dtype in args.dtypes for spec in args.codecs]
    if set(args.codecs) == set(CODECS):
        calls += [(spec, shape, "float32") for shape in SHAPES for spec in FAMILIES]
    launches: dict[str, Any] = {}
    steps: dict[str, Any] = {}
    record = {**harness.about("kernels_compiled.py"), "triton": version("triton"), "kernels": compiled.rows,
              "launches": launches, "steps": steps}  # fmt: skip
    for spec in {*args.codecs, *args.steps} & set(CODECS):
        parse_codec(spec).roundtrip(torch.randn(8, 384))  # levels and limits, which are computed once on the host
    # Saved tensors of a subclass are left alone; FakeTensor is one, but stands for plain ones here.
    with no_values(), mock.patch.object(passes, "Tensor", FakeTensor):
        for spec, shape, dtype in tqdm(calls, desc="codecs"):
            with told(f"{spec} {shape}"):
                found = codec_launches(spec, shape, getattr(torch, dtype), compiled)
                launches.setdefault(spec, found)
            harness.write(args.results, record)
        for name in tqdm(args.steps, desc="steps"):
            with told(f"step, {name}"):
                steps[name] = step_launches(name, compiled)
            harness.write(args.results, record)
    for name, ways in launches.items():
        print(f"{name:34s}" + "".join(f"  {way} {ours} + {own}" for way, (ours, own) in ways.items()))
    for name, (ours, own) in steps.items():
        print(f"step, {name:28s}  {ours} + {own}")
    spilled = sum(use["spilled"] > 0 for row in compiled.rows.values() for use in row["targets"].values())
    print(f"{len(compiled.seen)} kernels, {spilled} of them spill")


if __name__ == "__main__":
    main()
