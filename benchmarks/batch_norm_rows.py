"""How far a few rows of a batch overrate the rounding of what batch norms save, and what `auto` makes of it.

    python benchmarks/batch_norm_rows.py

EfficientNet-Lite0 on 64 images of CIFAR-10 at 96 px (the embedded data where ../shared/data is absent), before the
first step.  For each batch norm the error measured on 4 rows over that on all 64, as it comes out and as `auto` rates
it.  Writes benchmarks/results/batch_norm_rows.json.
"""

from __future__ import annotations

import statistics
from unittest import mock

import harness
import saved_gradient_error as data
import torch
from torch import Tensor, nn

from hf_actcompress import ActCompressConfig, compress_model
from hf_actcompress.saved import sensitivity

ALL, FEW = 64, 4


def errors(model: nn.Module, batch: dict[str, Tensor], rows: int, settled: float) -> dict[str, tuple[float, float]]:
    """(values of a channel, error) by batch norm."""
    config = ActCompressConfig(saved="auto:budget=0.1")
    with mock.patch.multiple(sensitivity, ROWS=rows // 2, SETTLED=settled, COST=1e9), \
            compress_model(model, config) as handle:  # fmt: skip
        model(**batch)
        slots = handle.budget.slots.values()
    found = {}
    for slot in slots:
        module = model.get_submodule(slot.name.split("#")[0])
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            found[slot.name] = slot.numel / module.num_features, slot.error
    return found


def main() -> None:
    harness.arguments(__doc__).parse_args()
    torch.manual_seed(0)
    with mock.patch.object(data, "ROWS", ALL):
        model, batch = data.images()
    model.train()
    whole = errors(model, batch, ALL, 0)
    few, rated = errors(model, batch, FEW, 0), errors(model, batch, FEW, sensitivity.SETTLED)
    norms = {
        name: {"values": values * FEW / ALL, "as it comes out": few[name][1] / error,
               "as rated": rated[name][1] / error}
        for name, (values, error) in whole.items()
    }  # fmt: skip
    by_values: dict[str, dict[str, float]] = {}
    for values in sorted({row["values"] for row in norms.values()}):
        own = [row for row in norms.values() if row["values"] == values]
        by_values[f"{values:.0f}"] = {kind: statistics.median(row[kind] for row in own)
                                      for kind in ("as it comes out", "as rated")}  # fmt: skip
        print(f"{values:7.0f} values of a channel: {by_values[f'{values:.0f}']}, {len(own)} norms")
    harness.save("batch_norm_rows", **{"rows": [FEW, ALL], "error on few over on all": norms,
                                       "medians by values of a channel": by_values})  # fmt: skip


if __name__ == "__main__":
    main()
