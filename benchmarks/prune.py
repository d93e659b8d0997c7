"""GoogLeNet on CIFAR-10, made smaller in three ways: the run behind the report card of docs/weights.md.

    python benchmarks/prune.py             # about 50 core-minutes the first time; resumable
    python benchmarks/prune.py --timing    # then times, memory and energy again, while the machine does nothing else

10,000 training images at 64 px, from random weights (bf16 autocast): 18 epochs dense; 20 % of the weights set to
zero; 20 % of the channels cut by Taylor importance and 6 epochs of retraining; int8 calibrated on 256 images.  The
recipe is examples/cifar/run_prune.py; the card is measured on the test images with one thread.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import harness
import torch

from hf_actcompress.cli import main as command_line

OPTIONS = ("--max_train_samples 10000 --image_size 64 --num_train_epochs 18 --retrain_epochs 6 --disable_tqdm True "
           "--logging_steps 10")  # fmt: skip
KEPT = ("name", "top1_error", "top5_error", "evaluated")  # of the run over all test images


def main() -> None:
    parser = harness.arguments(__doc__, data=True)
    parser.add_argument("--scratch", type=Path, default=Path("outputs/prune"), help="where the models are kept")
    parser.add_argument("--timing", action="store_true", help="measure times again; errors stay")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = harness.recipe("cifar/run_prune")
    if args.timing:
        record = harness.read("prune")
        folders = [str(args.scratch / row["name"]) for row in record["models"]]
        with tempfile.TemporaryDirectory() as out:
            if command_line(["card", *folders, "--data", str(args.data / "cifar10"), "--max-samples", "64", "--output",
                             out, "--repeats", "30", "--threads", "1"]):  # fmt: skip
                raise SystemExit(2)
            again = harness.read(Path(out) / "card.json")
        for row, new in zip(record["models"], again["models"], strict=True):
            row.update({key: value for key, value in new.items() if key not in KEPT})
        record |= {key: again[key] for key in ("repeats", "threads", "environment")}
    else:
        run.main([*OPTIONS.split(), "--dataset", str(args.data / "cifar10"), "--output_dir", str(args.scratch)])
        record = harness.read(args.scratch / "card" / "card.json")
        steps = {name: harness.read(args.scratch / name / "step.json") for name in run.STEPS[:3]}
        for step in steps.values():
            step.pop("history", None)
        record |= {"training": steps, "command": "python benchmarks/prune.py", "data": "CIFAR-10 (test)"}
    harness.write("prune", record)


if __name__ == "__main__":
    main()
