"""A student with a teacher against the same student alone: the runs behind the distillation table of docs/weights.md.

    python benchmarks/distill.py            # everything that is not there yet: 1 teacher and 6 students

SST-2 (5,000 rows), three seeds.  Teacher: the packaged MiniLM (6 layers), fine-tuned once.  Student: layers 0, 2 and
5 of the packaged MiniLM before fine-tuning.  Both see the same batches, in bf16 autocast where that is fast.  One JSON
per run in benchmarks/results/distill; a run whose file exists is skipped.  Earlier runs of 3 epochs at 5e-5 with a
loss on hidden states as well lie in results/distill_hidden.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

from hf_actcompress.workloads.results import bf16_is_fast

RESULTS = harness.RESULTS / "distill"
SEEDS = (0, 1, 2)
# Chosen with seed 10, which is none of those above.  Batches of alike lengths: padding triples their tokens otherwise.
OPTIONS = ("--max_train_samples 5000 --num_train_epochs 6 --learning_rate 1e-4 --warmup_steps 50 "
           "--per_device_train_batch_size 32 --max_length 64 --train_sampling_strategy group_by_length --layers 3 "
           "--temperature 2 --alpha 0.9 --hidden 0 --save_strategy no --disable_tqdm True")  # fmt: skip


@dataclass(frozen=True)
class Run:
    alone: bool
    seed: int

    @property
    def path(self) -> Path:
        return RESULTS / f"{'alone' if self.alone else 'taught'}__seed{self.seed}.json"

    def __str__(self) -> str:
        return self.path.stem


def execute(run: Run, data: Path, teacher: Path) -> dict[str, Any]:
    began = time.time()
    trained = (teacher / "config.json").is_file()
    with tempfile.TemporaryDirectory() as out:
        argv = [*OPTIONS.split(), "--dataset", str(data / "glue" / "sst2"), "--seed", str(run.seed), "--output_dir",
                out, "--alone", str(run.alone), "--student", str(student_folder(teacher)),
                "--bf16", str(bf16_is_fast())]  # fmt: skip
        if not run.alone:
            argv += ["--teacher", str(teacher) if trained else "minilm", "--teacher_epochs", "0" if trained else "2"]
        record = harness.recipe("glue/run_distill").main(argv)
        if not run.alone and not trained:
            shutil.move(Path(out) / "teacher", teacher)
    record["teacher"] = "minilm, 2 epochs"
    record["data"] = harness.without_folders(record["data"])
    return {**record, "seconds": round(time.time() - began, 1), "command": "python benchmarks/distill.py"}


def student_folder(teacher: Path) -> Path:
    """The untrained student: three layers of the packaged model; its classifier is made anew in each run."""
    folder = teacher.with_name("student")
    if not folder.is_dir():
        from hf_actcompress.weights.depth import drop_layers
        from hf_actcompress.workloads import load_text_model

        model, tokenizer = load_text_model("minilm", 2)
        drop_layers(model, 3)
        model.base_model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = harness.arguments(__doc__, data=True, plan=True)
    parser.add_argument("--scratch", type=Path, default=Path("outputs/distill"), help="where the teacher is kept")
    args = parser.parse_args()
    runs = [Run(alone, seed) for seed in SEEDS for alone in (False, True)]
    if args.list:
        return harness.list_runs(runs)
    args.scratch.mkdir(parents=True, exist_ok=True)
    # The first run trains the teacher; after it several calls may share the rest.
    harness.run_all(runs, lambda run: execute(run, args.data, args.scratch.resolve() / "teacher"))


if __name__ == "__main__":
    main()
