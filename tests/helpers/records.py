"""Result records as the recipes write them, and an index of a reference table, made by hand."""

import json


def record(codec="none", seed=0, plain=0.9, compressed=None, task="sst2", grad_codec=None, payload=(250, 500), **more):
    metric = "matthews_correlation" if task == "cola" else "accuracy"
    values = {"plain": plain} | ({} if compressed is None else {"compressed": compressed})
    channels = [
        {"boundary": f"layer.{i}", "direction": direction, "raw_bytes": 1000, "rel_error": 0.1 * (i + 1),
         "payload_bytes": payload[i] * (1 if direction == "forward" else 2)}
        for i in range(2) for direction in ("forward", "backward")
    ]  # fmt: skip
    none = codec == "none"
    config = None if none else {"grad_codec": grad_codec, "first": 1, "last": 2, "placement": "cuts"}
    base = {"task": task, "codec": codec, "seed": seed, "model": "minilm", "data": "local", "epochs": 2.0,
            "batch_size": 32, "learning_rate": 5e-5, "dtype": "fp32"}  # fmt: skip
    history = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)] + [{"step": 3, "train_runtime": 1.0}]
    return {**base, "metrics": {metric: values, "loss": {"plain": 0.3}}, "config": config, "history": history,
            "compression": [] if none else channels, **more}  # fmt: skip


RECORDS = [
    record(seed=0, plain=0.90), record(seed=1, plain=0.92), record(seed=2, plain=0.94),
    record("block:bits=4", 0, 0.91, 0.88, grad_codec="block:bits=8"),
    record("block:bits=4", 1, 0.93, 0.90, grad_codec="block:bits=8"),
    record("block:bits=4", 0, 0.91, 0.70),
    record("sort:bits=8", 0, 0.8, 0.7, payload=(500, 500)),
]  # fmt: skip


def table(folder, throughput=False, budget="cpu"):
    """Write an index of three rows, of which the last has no run, and the runs of the others; returns its path."""
    runs = {"none__seed0": record(seed=0, plain=0.90), "none__seed1": record(seed=1, plain=0.94),
            "sort__seed0": record("sort:bits=8", 0, 0.91, 0.88)}  # fmt: skip
    (folder / budget).mkdir(parents=True, exist_ok=True)
    for name, content in runs.items():
        (folder / budget / f"{name}.json").write_text(json.dumps(content))
    rows = [("no compression", "none", "96.1", ["none__seed0", "none__seed1"]),
            ("sort, 8 bits", "sort:bits=8", "95.7 (once)", ["sort__seed0"]),
            ("sort, 4 bits", "sort:bits=4", "87.1", [])]  # fmt: skip
    index = {
        "table": folder.name, "title": "Sorting", "budget": budget, "theirs": "a large model", "differs": "All.",
        "command": "python benchmarks/tables.py --table sort",
        "rows": [{"label": label, "codec": codec, "task": "sst2", "theirs": {"accuracy, %": theirs},
                  "runs": [f"{budget}/{name}.json" for name in names]} for label, codec, theirs, names in rows],
    }  # fmt: skip
    if throughput:
        speeds = [{"codec": "none", "of_none": 1.0, "of_none_range": [1.0, 1.0]},
                  {"codec": "sort:bits=8", "of_none": 0.9, "of_none_range": [0.85, 0.95]}]  # fmt: skip
        speed = {"rows": speeds, "model": "mobilenet", "first": 1, "last": 2}
        (folder / f"{budget}.throughput.json").write_text(json.dumps(speed))
        index["throughput"] = f"{budget}.throughput.json"
    path = folder / f"{budget}.json"
    path.write_text(json.dumps(index))
    return path
