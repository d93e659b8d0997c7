"""MiniLM on SST-2 (5,000 rows): every matrix of the encoder as a codebook of 4 values and 1 % exact corrections.

    python benchmarks/bert_codebook.py --data ../shared/data/glue/sst2
    python benchmarks/bert_codebook.py --data ../shared/data/glue/sst2 --runs lc-1e-4 --seeds 0,1,2

First the dense model is fine-tuned (2 epochs), then Learning-Compression goes on from it; the same further training
without compression is the control.  taught: with the dense model as teacher, by its outputs and hidden states.  One
JSON per run in results/bert_codebook; a run whose JSON is there is not repeated.  bf16 autocast where that is fast.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from hf_actcompress.weights import DistillationTrainer, LCCallback, LearningCompression, load_compressed
from hf_actcompress.workloads import build_compute_metrics, load_text, load_text_model, tokenize_splits
from hf_actcompress.workloads.results import bf16_is_fast

RESULTS = harness.RESULTS / "bert_codebook"
SCHEME = {"encoder.layer.*": "codebook:k=4 + prune:keep=1%"}
# Name -> learning rate (AdamW) and the penalty's weight, first and last; without a penalty: the control.
# hidden: weight of the loss on the teacher's hidden states.
RUNS: dict[str, dict[str, float]] = {
    "taught-1e-4": {"learning_rate": 1e-4, "mu": 3e-3, "end": 1.0, "hidden": 10.0},
    "lc-1e-4": {"learning_rate": 1e-4, "mu": 3e-3, "end": 1.0},
    "lc-5e-5": {"learning_rate": 5e-5, "mu": 3e-3, "end": 1.0},
    "control": {"learning_rate": 5e-5},
}
EVERY = 78  # steps between C steps: half an epoch
TUNE = 0.25  # share of the steps in which the floats are trained
TEMPERATURE, ALPHA = 2.0, 0.9  # of what the teacher says


def make_trainer(
    model: Any, setting: Any, folder: Path, seed: int, epochs: float, rate: float, *callbacks: Any,
    teacher: Any = None, hidden: float = 0.0,
) -> Any:
    data, tokenizer, train, evaluation = setting
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, learning_rate=rate, per_device_train_batch_size=32,
        per_device_eval_batch_size=64, eval_strategy="epoch", save_strategy="no", logging_steps=78, report_to=[],
        bf16=bf16_is_fast(), use_cpu=not torch.accelerator.is_available(), seed=seed, warmup_steps=20,
        disable_tqdm=not sys.stderr.isatty(), train_sampling_strategy="group_by_length",
    )  # fmt: skip
    kind = Trainer if teacher is None else partial(DistillationTrainer, teacher=teacher, temperature=TEMPERATURE,
                                                   alpha=ALPHA, hidden=hidden)  # fmt: skip
    return kind(
        model=model, args=arguments, train_dataset=train, eval_dataset=evaluation, processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer), compute_metrics=build_compute_metrics("sst2", 2),
        callbacks=list(callbacks),
    )  # fmt: skip


def train(name: str, dense: Path, setting: Any, folder: Path, seed: int, epochs: float) -> dict[str, Any]:
    began, options = time.perf_counter(), dict(RUNS[name])
    set_seed(seed)
    model, _ = load_text_model(str(dense), 2)
    rate = options.pop("learning_rate")
    record: dict[str, Any] = {"learning_rate": rate, **options}
    if "hidden" in options:
        record |= {"temperature": TEMPERATURE, "alpha": ALPHA}
    if not options:
        trainer = make_trainer(model, setting, folder, seed, epochs, rate)
        trainer.train()
    else:
        direct = LearningCompression(model, SCHEME)
        with direct.compressed():
            trainer = make_trainer(model, setting, folder, seed, epochs, rate)
            record["direct_accuracy"] = trainer.evaluate()["eval_accuracy"]
        steps = -(-len(setting[2]) // 32) * epochs * (1 - TUNE) / EVERY
        growth = (options["end"] / options["mu"]) ** (1 / max(steps - 1, 1))
        callback = LCCallback(SCHEME, mu=options["mu"], growth=growth, every=EVERY, tune=TUNE)
        teacher = load_text_model(str(dense), 2)[0] if "hidden" in options else None
        trainer = make_trainer(model, setting, folder, seed, epochs, rate, callback, teacher=teacher,
                               hidden=options.get("hidden", 0.0))  # fmt: skip
        trainer.train()
        path = callback.save(folder)
        load_compressed(folder, model)
        lc = callback.lc
        record |= {"scheme": SCHEME, "tune": TUNE, "layers_ratio": lc.layers_ratio, "ratio": lc.ratio, "bits": lc.bits,
                   "file_bytes": path.stat().st_size,
                   "distance": [e["lc/distance"] for e in trainer.state.log_history if "lc/distance" in e][-1],
                   }  # fmt: skip
    record["accuracy"] = trainer.evaluate()["eval_accuracy"]
    record["by_epoch"] = [e["eval_accuracy"] for e in trainer.state.log_history if "eval_accuracy" in e][:-1]
    return {**record, "seconds": time.perf_counter() - began}


@dataclass(frozen=True)
class Run:
    name: str
    seed: int
    path: Path

    def __str__(self) -> str:
        return f"{self.name} seed {self.seed}"


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--data", default="../shared/data/glue/sst2", help="a folder with SST-2, or a hub id")
    parser.add_argument("--task", help="the configuration of a hub id: sst2")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--work", default="outputs/bert_codebook", type=Path)
    parser.add_argument("--results", default=RESULTS, type=Path)
    parser.add_argument("--runs", default=",".join(RUNS), help=f"of {', '.join(RUNS)}")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load_text(options.data, options.task, max_train=options.rows)
    model, tokenizer = load_text_model(options.model, 2, texts=data.texts())
    setting = (data, tokenizer, *tokenize_splits(data, tokenizer, 64))
    dense = options.work / "dense"
    if not (dense / "accuracy.json").is_file():
        set_seed(0)
        model, _ = load_text_model(options.model, 2, texts=data.texts())
        trainer = make_trainer(model, setting, options.work / "run", 0, 2, 5e-5)
        trainer.train()
        trainer.save_model(str(dense))
        harness.write(dense / "accuracy.json", trainer.evaluate()["eval_accuracy"])
    accuracy = harness.read(dense / "accuracy.json")
    print(f"dense: {accuracy:.4f}", flush=True)
    runs = [Run(name, int(seed), options.results / f"{name}-seed{seed}.json")
            for name in options.runs.split(",") for seed in options.seeds.split(",")]  # fmt: skip

    def make(run: Run) -> dict[str, Any]:
        record = train(run.name, dense, setting, options.work / run.path.stem, run.seed, options.epochs)
        return {**record, "name": run.name, "seed": run.seed, "dense_accuracy": accuracy, "rows": len(setting[2]),
                "epochs": options.epochs, "model": options.model,
                **harness.about(f"bert_codebook.py --runs {run.name} --seeds {run.seed}")}  # fmt: skip

    harness.run_all(runs, make, said=lambda record: f"{record['accuracy']:.4f} {record.get('layers_ratio', '')}")


if __name__ == "__main__":
    main()
