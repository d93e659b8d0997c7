"""What every rank of tests/weights/test_lc.py runs, on gloo.  Each writes what it found as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.trainers import make_trainer, weights  # noqa: E402
from hf_actcompress.weights import LCCallback  # noqa: E402
from hf_actcompress.workloads.run import leave_process_group  # noqa: E402


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    for name, resume in (("whole", None), ("resumed", str(folder / "run" / "checkpoint-3"))):
        callback = LCCallback({"dense": "codebook:k=4"}, mu=0.05, every=2)
        trainer = make_trainer(
            folder / "run", callback, save_strategy="steps", save_steps=3, per_device_train_batch_size=2
        )
        trainer.train(resume_from_checkpoint=resume)
        found[name] = [float(value.double().sum()) for value in weights(trainer).values()]
    found["levels"] = max(len(p.unique()) for p in callback.lc.parameters.values())
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_process_group()
