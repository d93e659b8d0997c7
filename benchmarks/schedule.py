"""A codec schedule at work: half of the epochs with one codec, then another.

    python benchmarks/schedule.py

The reference table trained 40 epochs with sort 8 bits and 40 with 12.  Here the same switch happens on a short run of
the vision recipe (embedded digits, 32 px, about two minutes), beside the two codecs alone and no compression.  Writes
benchmarks/results/schedule.json with the ratio that the log showed in every epoch.
"""

from __future__ import annotations

import tempfile

import harness
from tqdm import tqdm

EPOCHS = 4
RUNS = {
    "none": ["--codec", "none"],
    "sort:bits=4": ["--codec", "sort:bits=4"],
    "sort:bits=8": ["--codec", "sort:bits=8"],
    "sort:bits=4, sort:bits=8 from epoch 2": ["--codec", "sort:bits=4", "--schedule", '{"2": "sort:bits=8"}'],
}


def main() -> None:
    harness.arguments(__doc__).parse_args()
    module, results = harness.recipe("cifar/run_cifar"), {}
    for name, options in tqdm(RUNS.items(), desc="runs"):
        with tempfile.TemporaryDirectory() as out:
            record = module.main(
                [*options, "--num_train_epochs", str(EPOCHS), "--image_size", "32", "--logging_steps", "5",
                 "--disable_tqdm", "True", "--output_dir", out]
            )  # fmt: skip
        ratios: dict[int, set[float]] = {}
        for line in record["history"]:
            for key, value in line.items():
                if key.endswith("forward_ratio"):
                    # A line tells of the steps before it.
                    ratios.setdefault(int(line["epoch"] - 1e-6), set()).add(round(value, 2))
        results[name] = {
            "metrics": record["metrics"],
            # the last evaluation repeats the last epoch's
            "accuracy_by_epoch": [h["eval_accuracy"] for h in record["history"] if "eval_accuracy" in h][:EPOCHS],
            "forward_ratios_by_epoch": {epoch: sorted(values) for epoch, values in sorted(ratios.items())},
        }
    harness.save("schedule", runs=results)
    for name, result in results.items():
        print(f"{name}: {result['accuracy_by_epoch']} ratios {result['forward_ratios_by_epoch']}")


if __name__ == "__main__":
    main()
