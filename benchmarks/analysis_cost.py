"""What `analysis=True` costs: the time of a sampled step's measurement against that of a training step.

    python benchmarks/analysis_cost.py

Each repeat times in turn a training step with compressed boundaries (forward, backward, AdamW) and the same step with
a measurement in it, so that other load on the machine meets both.  The share of a run is the difference over `every`
steps.  The choice of `codec="auto:ratio=8"` is timed as well, once.  Settings of benchmarks/accuracy.py.  Writes
benchmarks/results/analysis_cost.json.
"""

from __future__ import annotations

import statistics

import harness
import torch
from harness import seconds
from tqdm import tqdm

from hf_actcompress import ActCompressConfig, compress_model
from hf_actcompress.observe import auto
from hf_actcompress.observe.probe import EVERY
from hf_actcompress.workloads.batches import training_batches

CASES = {
    "minilm": ("cola", 32, {"first": 1, "last": 2}, 536),
    "efficientnet-lite0": ("cifar10", 64, {"first": 1, "last": 1}, 158),
}  # model: (data, batch, cuts, steps of a run of benchmarks/accuracy.py)


def main() -> None:
    parser = harness.arguments(__doc__, data=True)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    rows = []
    for name, (data, size, cuts, steps) in CASES.items():
        model, (batch,), _ = training_batches(name, data, root=args.data, batches=1, batch_size=size)
        if name != "minilm":
            model = model.to(memory_format=torch.channels_last)
        config = ActCompressConfig("block:bits=4", placement="cuts", analysis=True, **cuts)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def step(model=model, batch=batch, optimizer=optimizer) -> None:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        with compress_model(model, config, example_inputs={k: v for k, v in batch.items() if k != "labels"}) as handle:
            plain, sampled = [], []
            for repeat in tqdm(range(args.repeats + 1), desc=name):
                for number, times in ((1, plain), (0, sampled)):
                    handle.probe.arm(number)
                    times.append(seconds(step))
                if repeat == 0:  # warms up
                    plain.clear(), sampled.clear()
        more = [b / a - 1 for a, b in zip(plain, sampled, strict=True)]
        run = len(range(0, steps, EVERY))
        with compress_model(
            model, ActCompressConfig("auto:ratio=8", placement="cuts", **cuts),
            example_inputs={k: v for k, v in batch.items() if k != "labels"},
        ) as handle:  # fmt: skip
            choosing = seconds(step)
            chosen = handle.auto.chosen
        measured = len([n for n in range(steps) if n in (0, auto.SECOND) or n % auto.REFRESH == 0])
        rows.append({
            "model": name, "data": data, "batch_size": size, "threads": torch.get_num_threads(), "every": EVERY,
            "repeats": args.repeats, "step_seconds": statistics.median(plain), "steps_of_a_sample": _spread(more),
            "share": statistics.median(more) / EVERY, "run_steps": steps,
            "run_share": run * statistics.median(more) / steps,
            "auto_steps": choosing / statistics.median(plain) - 1, "auto_measured": measured,
            "auto_share": measured * (choosing / statistics.median(plain) - 1) / steps, "auto_chosen": chosen,
        })  # fmt: skip
        row, sample = rows[-1], statistics.median(more)
        print(f"{name}: step {row['step_seconds']:.2f} s; a sample {sample:.2f} steps more; "
              f"{100 * row['share']:.2f} % at every {EVERY}, {100 * row['run_share']:.2f} % of {steps} steps; "
              f"auto {row['auto_steps']:.1f} steps a choice, {100 * row['auto_share']:.1f} % of {steps}")  # fmt: skip
    harness.write("analysis_cost", rows)


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


if __name__ == "__main__":
    main()
