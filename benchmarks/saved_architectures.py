"""How far gradients are off with compressed saved tensors, over the architectures of transformers and timm.

    python benchmarks/saved_architectures.py [--models llama resnet18 ...] [--force]

One step of a small model with random weights (architectures.py), fp32, training mode without dropout, one thread on a
CPU, each model in a process of its own with a time limit.  Identity: whether loss and gradients are those of a plain
step, bit for bit.  Error: |g' - g| / |g| over the gradients of all parameters at 8, 4, 2 bits, and of the parameter
that is off most among those with at least 1/10000 of the norm.  Sharp: the same after the queries of attention were
multiplied by 8, since random weights have flat attention.  The site's own limit for small tensors stays (16384
elements); batches are as large as that takes.  Writes benchmarks/results/saved_architectures.json after each model;
what is there is not measured again.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import statistics
import time
import warnings
from typing import Any

import harness
import torch
from architectures import Batch, of_timm, of_transformers, sharpen, timm_models, transformers_models
from torch import Tensor, nn
from tqdm import tqdm

from hf_actcompress import ActCompressConfig, compress_model
from hf_actcompress.models.replay import loss_of

ROWS = 8  # of a batch; four times as many where tensors would be too small to be coded
BITS = (8, 4, 2)
SMALL_NORM = 1e-4  # of the norm of all gradients; the gradient of the bias of a key, say, is zero but for rounding


class Step:
    """Steps of a model from the same buffers and random state."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self.buffers = [(b, b.clone()) for b in model.buffers()]

    def __call__(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, and gradients by parameter."""
        self.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in self.buffers:
                buffer.copy_(before)
        torch.manual_seed(1)
        loss = loss_of(self.model(**self.batch))
        loss.backward()
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return loss.detach(), found


def try_step(model: nn.Module, batch: Batch) -> None:
    _, found = Step(model, batch)()
    if not found:
        raise ValueError("no gradients")


def norm(tensors: Any) -> float:
    return float(torch.stack([t.double().norm() for t in tensors]).norm())


def same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> bool:
    return torch.equal(one[0], other[0]) and one[1].keys() == other[1].keys() and all(
        torch.equal(g, other[1][name]) for name, g in one[1].items()
    )  # fmt: skip


def errors(exact: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Any]:
    whole = norm(exact.values())
    off = {name: norm([found[name] - g]) for name, g in exact.items()}
    own = {name: off[name] / n for name, g in exact.items() if (n := norm([g])) >= SMALL_NORM * whole}
    worst = max(own, key=lambda name: own[name] if own[name] == own[name] else float("inf"))
    middle = statistics.median(sorted(off[name] / n for name, g in exact.items() if (n := norm([g]))))
    whole_error = norm([torch.tensor(list(off.values()))]) / whole
    return {"error": whole_error, "median": middle, "worst": own[worst], "worst_parameter": worst}


def compared(step: Step, every: tuple[int, ...] = BITS) -> dict[str, Any]:
    """Identity and numbers of bits against a plain step."""
    exact = step()
    if not all(bool(g.isfinite().all()) for g in exact[1].values()) or not norm(exact[1].values()):
        raise ValueError("the plain gradients are not finite, or all zero")
    with compress_model(step.model, ActCompressConfig(saved="identity")) as handle:
        found, report = step(), handle.report()
    small = sum(r["raw_bytes"] for r in report if r["operation"] == "small tensors")
    result: dict[str, Any] = {"identity": same(exact, found), "small": small / sum(r["raw_bytes"] for r in report)}
    if not result["identity"] and not same(exact, step()):
        raise ValueError("two plain steps differ")
    for bits in every:
        with compress_model(step.model, ActCompressConfig(saved=f"block:bits={bits}")) as handle:
            result[str(bits)] = errors(exact[1], step()[1])
            record, report = handle.stats()[-1], handle.report()
        result[str(bits)] |= {"raw_bytes": record["raw_bytes"], "held_bytes": record["payload_bytes"]}
    kept = sorted((r["held_bytes"], r["operation"]) for r in report if r["kept"] == "exactly")
    result["exactly"] = {operation: held for held, operation in kept[:-4:-1]}
    return result


def measure(library: str, name: str) -> dict[str, Any]:
    begin = time.perf_counter()
    make, rows = (of_transformers if library == "transformers" else of_timm), ROWS
    model, batch = make(name, rows, try_step)
    found = compared(Step(model, batch))
    if found["small"] > 0.3:
        model, batch = make(name, 4 * rows, try_step)
        found = compared(Step(model, batch))
    shapes = {key: list(value.shape) for key, value in batch.items()}
    result = {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters()), "batch": shapes}
    if sharpen(model):
        try:
            result["sharp"] = compared(Step(model, batch), BITS[:2])
        except ValueError as error:
            result["sharp_failed"] = str(error)
    result |= found
    return result | {"seconds": round(time.perf_counter() - begin, 1)}


def _child(library: str, name: str, out: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    try:
        out.send(measure(library, name))
    except BaseException as error:  # noqa: BLE001  (whatever it is, it is the result)
        out.send({"failed": f"{type(error).__name__}: {str(error)[:300]}"})


def in_process(library: str, name: str, limit: float) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(library, name, send))
    process.start()
    send.close()
    try:
        return receive.recv() if receive.poll(limit) else {"failed": f"more than {limit:g} s"}
    except EOFError:
        process.join()
        return {"failed": f"the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def said(found: dict[str, Any]) -> str:
    if "failed" in found:
        return found["failed"][:100].replace("\n", " ")
    cells = []
    for row in (found, found.get("sharp")):
        if row is not None:
            less = row["4"]["raw_bytes"] / max(1, row["4"]["held_bytes"])
            numbers = (f"{row[str(bits)]['error']:.3g}" for bits in BITS if str(bits) in row)
            cells += ["same" if row["identity"] else "DIFFERS", *numbers, f"1/{less:.1f} |"]
    return f"{' '.join(cells)} {found['exactly']} {found['seconds']} s"


def main() -> None:
    parser = harness.arguments(__doc__, force=True, results="saved_architectures")
    parser.add_argument("--models", nargs="+", help="Only these.")
    parser.add_argument("--library", choices=("transformers", "timm"), help="Only this one.")
    parser.add_argument("--retry", action="store_true", help="Measure again what failed.")
    parser.add_argument("--limit", type=float, default=60, help="Seconds for a model.")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    import timm  # noqa: F401  (once, before the processes are forked)
    import transformers  # noqa: F401

    names = {"transformers": transformers_models(), "timm": list(timm_models())}
    kept = harness.Kept(args.results, "saved_architectures.py", args.force)
    for some in names.values():
        random.Random(0).shuffle(some)
    # Two of one for one of the other, so that a run that is stopped has seen some of everything.
    turns = [(i if library == "timm" else i // 2, library, name) for library, some in names.items()
             for i, name in enumerate(some)]  # fmt: skip
    for _, library, name in tqdm(sorted(turns)):
        if (args.library or library) == library and (not args.models or name in args.models):
            if args.retry and "failed" in kept.data.get(library, {}).get(name, {}):
                del kept.data[library][name]
            known = name in kept.data.get(library, {})
            found = kept(name, lambda library=library, name=name: in_process(library, name, args.limit), library)
            if not known or args.force:
                tqdm.write(f"{library} {name}: {said(found)}")


if __name__ == "__main__":
    main()
