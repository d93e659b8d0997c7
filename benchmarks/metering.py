"""What the metrics cost: time spent sampling errors, as a share of training steps.

    python benchmarks/metering.py

Trains the packaged MiniLM on random tokens (32 x 128 and 32 x 16) with boundaries that do nothing (identity), so that
the codec's own time is not in the way, and times every call of the meter.  Writes benchmarks/results/metering.json.
"""

from __future__ import annotations

import statistics
import time

import harness
import torch

from hf_actcompress import ActCompressConfig, compress_model
from hf_actcompress.observe.meter import Meter
from hf_actcompress.workloads import load_text_model

STEPS = 20


def measure(tokens: int) -> dict[str, float]:
    model, _ = load_text_model("minilm", 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batch = {
        "input_ids": torch.randint(1000, 30000, (32, tokens)),
        "attention_mask": torch.ones(32, tokens, dtype=torch.long),
        "labels": torch.randint(0, 2, (32,)),
    }
    spent, plain = [0.0], Meter.__call__

    def timed(function):
        def run(*args):
            began = time.perf_counter()
            try:
                return function(*args)
            finally:
                spent[0] += time.perf_counter() - began
        return run

    steps = []
    try:
        Meter.__call__ = timed(plain)
        with compress_model(model, ActCompressConfig("identity", first=1, last=2)):
            for step in range(STEPS + 2):
                if step == 2:
                    spent[0] = 0.0
                began = time.perf_counter()
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if step >= 2:
                    steps.append(time.perf_counter() - began)
    finally:
        Meter.__call__ = plain
    return {
        "tokens": tokens,
        "steps": STEPS,
        "median_step_s": round(statistics.median(steps), 4),
        "metering_s_per_step": round(spent[0] / STEPS, 6),
        "share": round(spent[0] / sum(steps), 6),
    }


def main() -> None:
    harness.arguments(__doc__).parse_args()
    torch.manual_seed(0)
    rows = [measure(tokens) for tokens in (16, 128)]
    harness.save("metering", rows=rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
