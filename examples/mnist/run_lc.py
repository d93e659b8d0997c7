"""Compress LeNet5 (431,080 parameters) on MNIST by Learning-Compression, to a file of the counted size.

    python examples/mnist/run_lc.py --scheme '{"conv*": "prune:keep=2505", "fc*": "codebook:k=2"}'
    python examples/mnist/run_lc.py --scheme '{"*": "lowrank:rank=auto,alpha=2e-6"}' --epochs 15 --mu 1e-2 --end 0.3
    python examples/mnist/run_lc.py --list          # the mixes of the reference report, by name
    python examples/mnist/run_lc.py --scheme prune-codebook

The dense reference is trained at the first run and kept in --output_dir.  Training moves the images by up to two
pixels at random; the test set is as it is.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import set_seed

from hf_actcompress.weights import LCCallback, LearningCompression, distillation_loss, load_compressed
from hf_actcompress.workloads.lenet import Digits, LeNet5, load_digits, make_trainer
from hf_actcompress.workloads.results import environment, print_results, write_results

CODEBOOK, PRUNE, LOWRANK = "codebook:k=2", "prune:keep={}", "lowrank:rank=auto,alpha={}"
# Convolutions and linear layers, as in the reference report.
MIXES: dict[str, dict[str, str]] = {
    "prune-codebook": {"conv*": PRUNE.format(2505), "fc*": CODEBOOK},
    "prune-lowrank": {"conv1": PRUNE.format(104), "conv2": PRUNE.format(2505), "fc*": LOWRANK.format("2e-6")},
    "prune-prune": {"conv*": PRUNE.format(2505), "fc*": PRUNE.format(6000)},
    "codebook-codebook": {"*": CODEBOOK},
    "codebook-prune": {"conv*": CODEBOOK, "fc*": PRUNE.format(20000)},
    "codebook-lowrank": {"conv*": CODEBOOK, "fc*": LOWRANK.format("2e-6")},
    "lowrank-codebook": {"conv*": LOWRANK.format("2e-6"), "fc*": CODEBOOK},
    "lowrank-prune": {"conv*": LOWRANK.format("2e-6"), "fc*": PRUNE.format(6000)},
    "lowrank-lowrank": {"*": LOWRANK.format("2e-6")},
}


def reference(
    path: Path, train: Digits, evaluation: Digits, epochs: float = 25, seed: int = 0, **arguments: Any
) -> tuple[LeNet5, float]:
    """The dense network and its error in %: loaded from `path`, or trained and saved there."""
    set_seed(seed)
    model = LeNet5()
    trainer = make_trainer(model, train, evaluation, str(path.parent / "reference"), epochs=epochs,
                           learning_rate=0.08, seed=seed, **arguments)  # fmt: skip
    if path.is_file():
        model.load_state_dict(load_file(path))
    else:
        trainer.train()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        save_file(model.state_dict(), unfinished)
        unfinished.replace(path)
    return model, trainer.evaluate()["eval_error"]


class Distill:
    """A loss for the Trainer: the labels, and a teacher's softened answers to the same images."""

    def __init__(self, teacher: nn.Module, temperature: float = 4.0, weight: float = 0.7) -> None:
        self.teacher, self.temperature, self.weight = teacher.eval(), temperature, weight
        self.pixels: Tensor | None = None

    def watch(self, model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the student: the loss is handed no inputs."""
        self.pixels = kwargs["pixel_values"]

    def __call__(self, outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        if not self.weight:
            return F.cross_entropy(outputs["logits"], labels)
        with torch.no_grad():
            target = self.teacher(self.pixels)["logits"]
        soft = distillation_loss(outputs["logits"], target, self.temperature)
        return (1 - self.weight) * F.cross_entropy(outputs["logits"], labels) + self.weight * soft


def compress(
    model: LeNet5, scheme: dict[str, str], train: Digits, evaluation: Digits, folder: Path, *, epochs: float = 20,
    learning_rate: float = 0.03, mu: float = 1e-2, end: float = 0.3, every: int = 24, seed: int = 0,
    temperature: float | None = None, tune: float = 0.2, **arguments: Any,
) -> dict[str, Any]:  # fmt: skip
    """One run: train a copy of `model`, save it to `folder`, load the file again and evaluate that.

    mu grows from `mu` to `end` over all C steps, one each `every` optimizer steps (a tenth of an epoch), until for
    the last share `tune` of all steps the floats of what was compressed are trained.
    """
    began = time.perf_counter()
    set_seed(seed)
    student = LeNet5()
    student.load_state_dict(model.state_dict())
    steps = -(-len(train) // 256) * epochs * (1 - tune) / every
    growth = max(1.0, (end / mu) ** (1 / max(steps - 1, 1)))
    direct = LearningCompression(student, scheme, mu=mu)
    callback = LCCallback(scheme, mu=mu, growth=growth, every=every, tune=tune)
    loss = None
    if temperature is not None:
        loss = Distill(model, temperature)
        student.register_forward_pre_hook(loss.watch, with_kwargs=True)
    trainer = make_trainer(student, train, evaluation, str(folder), epochs=epochs, learning_rate=learning_rate,
                           weight_decay=0.0, callbacks=[callback], loss=loss, seed=seed, **arguments)  # fmt: skip
    with direct.compressed():
        before = trainer.evaluate()["eval_error"]
    trainer.train()
    lc = callback.lc
    assert lc is not None
    path = lc.save(folder)
    load_compressed(folder, student)
    logged = [e["lc/distance"] for e in trainer.state.log_history if "lc/distance" in e]
    kept = {name: {"of": p.numel(), "nonzero": int((p != 0).sum())} for name, p in lc.parameters.items()}
    return {
        "scheme": scheme, "error": trainer.evaluate()["eval_error"], "ratio": lc.ratio, "bits": lc.bits,
        "file_bytes": path.stat().st_size, "direct_error": before, "layers": kept,
        "distance": logged[-1] if logged else None,
        "epochs": epochs, "learning_rate": learning_rate, "mu": mu, "mu_end": end, "every": every, "tune": tune,
        "seed": seed, "temperature": temperature, "seconds": time.perf_counter() - began,
        "errors": [round(e["eval_error"], 3) for e in trainer.state.log_history if "eval_error" in e],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="prune-codebook", help="a name of --list, or JSON: pattern to compression")
    parser.add_argument("--list", action="store_true", help="print the mixes that have names, and stop")
    parser.add_argument("--dataset", default="mnist", help="a folder or hub id with MNIST (default: the hub's mnist)")
    parser.add_argument("--output_dir", default="outputs/mnist", type=Path)
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--learning_rate", type=float, default=0.03)
    parser.add_argument("--mu", type=float, default=1e-2, help="weight of the penalty at first")
    parser.add_argument("--end", type=float, default=0.3, help="weight of the penalty at the end")
    parser.add_argument("--every", type=int, default=24, help="optimizer steps from one C step to the next")
    parser.add_argument("--tune", type=float, default=0.2, help="share of the steps that train the floats at the end")
    parser.add_argument("--temperature", type=float, help="distil from the dense reference at this temperature")
    parser.add_argument("--reference_epochs", type=float, default=25)
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--max_eval_samples", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(f"{name:20}{json.dumps(scheme)}" for name, scheme in MIXES.items()))
        return None
    scheme = MIXES[options.scheme] if options.scheme in MIXES else options.scheme
    scheme = json.loads(scheme) if isinstance(scheme, str) and scheme.lstrip().startswith("{") else scheme
    scheme = {"*": scheme} if isinstance(scheme, str) else scheme
    LCCallback(scheme)  # a misspelt scheme should not cost the reference's training first
    train, evaluation = load_digits(
        options.dataset, shift=2, max_train=options.max_train_samples, max_eval=options.max_eval_samples
    )
    dense = options.output_dir / "reference.safetensors"
    model, error = reference(dense, train, evaluation, options.reference_epochs, options.seed)
    record = compress(
        model, scheme, train, evaluation, options.output_dir / "compressed", epochs=options.epochs,
        learning_rate=options.learning_rate, mu=options.mu, end=options.end, every=options.every, seed=options.seed,
        temperature=options.temperature, tune=options.tune,
    )  # fmt: skip
    record = {"reference_error": error, **record, "environment": environment()}
    write_results(options.output_dir, record)
    shown = ("reference_error", "direct_error", "error", "ratio", "bits", "file_bytes", "distance", "seconds")
    print_results({"scheme": json.dumps(scheme), **{key: record[key] for key in shown}})
    print(f"Compressed model: {options.output_dir / 'compressed' / 'compressed.safetensors'}")
    return record


if __name__ == "__main__":
    main()
