"""Which early quantity predicts how much accuracy a compressed training loses?  No training here: reads, ranks, draws.

    python benchmarks/predictor_study.py

Reads the runs of predictor.py ("short": analysis records of the first tenth of the steps) and of accuracy.py ("long":
whole trainings, with records of their first two steps by `predictor.py --beginnings`, errors metered over the whole
run, and losses and gradient norms of the first tenth).  Writes benchmarks/results/predictor.json and
docs/figures/predictor.png.

What is predicted is the share of the margin that is lost: (none - run) / (none - chance), so that tasks compare; a
run counts as harmed above LOST.  Per quantity: Spearman's rank correlation within each task, averaged over tasks,
with a bootstrap interval (runs drawn anew within tasks); a threshold; and its hits on each task when it was chosen on
the others alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from harness import FIGURES, RESULTS, arguments, read, write
from scipy.stats import rankdata

from hf_actcompress.report.records import METRICS, load_records
from hf_actcompress.report.tables import codecs_of

LOST = 0.1
CHANCE = {"cola": 0.0, "sst2": 0.509, "cifar10": 0.1, "mnist": 0.1135}  # SST-2, MNIST: the largest class
DRAWS = 2000
KNOWN = 0.5  # quantities that fewer of the runs have are left out: a few runs may show anything
Run = dict[str, Any]  # task, codec, lost, and one number (or None) per quantity


# Runs and their quantities


def short_runs(records: Sequence[dict[str, Any]]) -> list[Run]:
    return _runs(records, lambda record, _: _early(record["early"]))


def long_runs(records: Sequence[dict[str, Any]], beginnings: Sequence[dict[str, Any]] = ()) -> list[Run]:
    """`beginnings`: records of the first steps, one for all seeds of a pair of codecs."""
    first = {(b["task"], *codecs_of({**b, "config": {"grad_codec": b["grad_codec"]}})): _early(b["early"])
             for b in beginnings}  # fmt: skip
    empty = dict.fromkeys(next(iter(first.values()), {}))

    def quantities(record: dict[str, Any], plain: Sequence[dict[str, Any]]) -> dict[str, float | None]:
        return {**first.get((record["task"], *codecs_of(record)), empty), **_metered(record, plain)}

    return _runs(records, quantities)


def _runs(records: Sequence[dict[str, Any]], quantities: Callable[..., dict[str, float | None]]) -> list[Run]:
    """The compressed runs of tasks of known chance that have runs without compression, too."""
    result = []
    for task in dict.fromkeys(record["task"] for record in records):
        metric = METRICS.get(task, "accuracy")
        own = [record for record in records if record["task"] == task]
        plain = [record for record in own if record["codec"] == "none"]
        if not plain or task not in CHANCE:
            continue
        none = [float(record["metrics"][metric]["plain"]) for record in plain]
        margin = float(np.mean(none)) - CHANCE[task]
        for record in own:
            if record["codec"] != "none":
                value = float(record["metrics"][metric]["compressed"])
                forward, backward = codecs_of(record)
                result.append({"task": task, "codec": forward, "grad_codec": backward, "seed": record["seed"],
                               "cuts": record.get("cuts"), "lost": (float(np.mean(none)) - value) / margin,
                               **_ratio(record), **quantities(record, plain)})  # fmt: skip
    return result


def _early(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """From the records of the first steps: the worst boundary of each direction, and the whole gradient."""
    found: dict[str, float | None] = {}
    for direction in ("forward", "backward"):
        own = [row for row in rows if row["site"] == "boundary" and row["direction"] == direction]
        for name, worst in (("rel_error", max), ("cosine", min), ("effective_bits", min), ("zeroed", max),
                            ("saturated", max), ("outlier", max), ("kurtosis", max)):  # fmt: skip
            values = [row[name] for row in own if row[name] is not None]
            found[f"{name}, {direction}"] = worst(values) if values else None
        biases = [abs(row["bias"]) for row in own if row["bias"] is not None]
        found[f"|bias|, {direction}"] = max(biases, default=None)
    found["rel_error, either direction"] = _larger(found, "rel_error, {}")
    whole = [row for row in rows if row["site"] == "parameters"]
    total = next((row for row in whole if row["layer"] is None), {})
    found["cosine, parameter gradient"] = total.get("cosine")
    found["rel_error, parameter gradient"] = total.get("rel_error")
    layers = [row["cosine"] for row in whole if row["layer"] is not None and row["cosine"] is not None]
    found["cosine, worst layer's gradient"] = min(layers, default=None)
    losses = (total.get("loss"), total.get("plain_loss"))
    found["loss - plain loss"] = losses[0] - losses[1] if None not in losses else None
    return found


def _metered(record: dict[str, Any], plain: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """From a record without analysis: meters of the whole run, and the log of its first tenth against none's."""
    found: dict[str, float | None] = {}
    for direction in ("forward", "backward"):
        own = [row for row in record["compression"] if row["direction"] == direction]
        for name, worst in (("rel_error", max), ("cosine", min)):
            values = [_number(row[name]) for row in own if row.get(name) is not None]
            values = [value for value in values if math.isfinite(value)]
            found[f"{name}, {direction}, whole run"] = worst(values) if values else None
    found["rel_error, either direction, whole run"] = _larger(found, "rel_error, {}, whole run")
    same = [other for other in plain if other["seed"] == record["seed"]] or plain[:1]
    for key, name in (("loss", "early loss - none's"), ("grad_norm", "early gradient norm over none's")):
        ours, theirs = (_first_tenth(other["history"], key) for other in (record, same[0]))
        if ours is None or not theirs:
            found[name] = None
        else:
            found[name] = ours - theirs if key == "loss" else ours / theirs
    return found


def _larger(found: dict[str, float | None], name: str) -> float | None:
    values = [found[name.format(direction)] for direction in ("forward", "backward")]
    return max((value for value in values if value is not None), default=None)


def _first_tenth(history: Sequence[dict[str, Any]], key: str) -> float | None:
    last = max((entry["step"] for entry in history), default=0)
    values = [_number(e[key]) for e in history if key in e and e["step"] <= max(0.1 * last, history[1]["step"])]
    values = [value for value in values if math.isfinite(value)]
    return float(np.mean(values)) if values else None


def _ratio(record: dict[str, Any]) -> dict[str, float | None]:
    rows = [row for row in record["compression"] if row["direction"] == "forward"]
    payload = sum(row["payload_bytes"] for row in rows)
    return {"compression ratio": sum(row["raw_bytes"] for row in rows) / payload if payload else None}


def _number(value: Any) -> float:
    return float(value)  # "nan" and "inf" are strings in a record


# Statistics


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation with ties; None where one side is constant or there are fewer than four."""
    if len(x) < 4:
        return None
    a, b = rankdata(x), rankdata(y)
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else None


def within_tasks(runs: Iterable[Run], name: str) -> float | None:
    """Spearman's correlation of a quantity with what is lost, averaged over the tasks."""
    by_task: dict[str, list[Run]] = {}
    for run in runs:
        if run[name] is not None:
            by_task.setdefault(run["task"], []).append(run)
    found = [spearman([r[name] for r in group], [r["lost"] for r in group]) for group in by_task.values()]
    values = [value for value in found if value is not None]
    return float(np.mean(values)) if values else None


def interval(runs: Sequence[Run], name: str, draws: int = DRAWS, seed: int = 0) -> tuple[float, float] | None:
    """95 % bootstrap interval of `within_tasks`: runs are drawn with replacement within each task."""
    generator = np.random.default_rng(seed)
    tasks = [[run for run in runs if run["task"] == task] for task in dict.fromkeys(run["task"] for run in runs)]
    found = []
    for _ in range(draws):
        drawn = [group[i] for group in tasks for i in generator.integers(0, len(group), len(group))]
        value = within_tasks(drawn, name)
        if value is not None:
            found.append(value)
    if not found:
        return None
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def threshold(runs: Sequence[Run], name: str, rising: bool) -> float | None:
    """The value between two runs that tells harmed from others best (balanced accuracy); the middle of ties."""
    known = [(run[name], run["lost"] > LOST) for run in runs if run[name] is not None]
    if len({bad for _, bad in known}) < 2:
        return None
    values = sorted({value for value, _ in known})
    cuts = [(a + b) / 2 for a, b in zip(values, values[1:], strict=False)]
    scores = [_balanced(known, cut, rising) for cut in cuts]
    if not scores:
        return None
    best = [cut for cut, score in zip(cuts, scores, strict=True) if score >= max(scores) - 1e-12]
    return best[len(best) // 2]


def _balanced(known: Sequence[tuple[float, bool]], cut: float, rising: bool) -> float:
    bad = [(value > cut) == rising for value, is_bad in known if is_bad]
    good = [(value > cut) != rising for value, is_bad in known if not is_bad]
    return (sum(bad) / len(bad) + sum(good) / len(good)) / 2


def left_out(runs: Sequence[Run], name: str, rising: bool) -> list[dict[str, Any]]:
    """For each task: the threshold from the other tasks, and what it says of this one."""
    result = []
    for task in dict.fromkeys(run["task"] for run in runs):
        cut = threshold([run for run in runs if run["task"] != task], name, rising)
        own = [run for run in runs if run["task"] == task and run[name] is not None]
        row = {"task": task, "threshold": cut, "runs": len(own)}
        if cut is not None:
            said = [((run[name] > cut) == rising, run["lost"] > LOST) for run in own]
            row |= {"harmed": sum(bad for _, bad in said), "caught": sum(a and b for a, b in said),
                    "false_alarms": sum(a and not b for a, b in said),
                    "right": sum(a == b for a, b in said)}  # fmt: skip
        result.append(row)
    return result


def study(runs: Sequence[Run], draws: int = DRAWS) -> dict[str, Any]:
    """Every quantity with its correlation, interval, threshold and hits, the strongest first."""
    fixed = {"task", "codec", "grad_codec", "seed", "cuts", "lost"}
    names = dict.fromkeys(name for run in runs for name in run if name not in fixed)
    rows = []
    for name in names:
        rho, known = within_tasks(runs, name), sum(run[name] is not None for run in runs)
        if rho is None or known < KNOWN * len(runs):
            continue
        rising, low_high = rho > 0, interval(runs, name, draws)
        hits = left_out(runs, name, rising)
        counted = [row for row in hits if row["threshold"] is not None]
        bad = sum(row["harmed"] for row in counted)
        total = sum(row["runs"] for row in counted)
        rows.append({"quantity": name, "rho": rho, "interval": low_high, "rising": rising,
                     "known": known, "threshold": threshold(runs, name, rising),
                     "left_out": hits, "caught": sum(row["caught"] for row in counted), "harmed": bad,
                     "false_alarms": sum(row["false_alarms"] for row in counted), "harmless": total - bad,
                     "by_task": {task: within_tasks([r for r in runs if r["task"] == task], name)
                                 for task in dict.fromkeys(run["task"] for run in runs)}})  # fmt: skip
    rows.sort(key=lambda row: -abs(row["rho"]))
    tasks = dict.fromkeys(run["task"] for run in runs)
    return {"runs": len(runs), "tasks": {task: sum(run["task"] == task for run in runs) for task in tasks},
            "harmed": sum(run["lost"] > LOST for run in runs), "quantities": rows, "points": list(runs)}


def _beginnings() -> list[dict[str, Any]]:
    return [read(path) for path in sorted((RESULTS / "predictor_beginnings").rglob("*.json"))]


def main() -> None:
    arguments(__doc__).parse_args()
    found = {}
    for name, folder, runs_of in (("short", "predictor", short_runs), ("long", "accuracy", long_runs)):
        if (RESULTS / folder).is_dir():
            more = [_beginnings()] if name == "long" else []
            runs = runs_of(load_records(RESULTS / folder), *more)
            if len(runs) >= 8:
                found[name] = study(runs)
    if not found:
        raise SystemExit("There are no runs to study: run benchmarks/predictor.py or benchmarks/accuracy.py first.")
    for name, result in found.items():
        print(f"{name}: {result['runs']} runs, {result['harmed']} harmed")
        for row in result["quantities"][:12]:
            low, high = row["interval"] or (math.nan, math.nan)
            print(f"  {row['quantity']:36s} rho {row['rho']:+.2f} ({low:+.2f} to {high:+.2f})  threshold "
                  f"{row['threshold'] if row['threshold'] is not None else math.nan:.3g}  caught {row['caught']}/"
                  f"{row['harmed']}, false alarms {row['false_alarms']}/{row['harmless']}")  # fmt: skip
    record = {"command": "python benchmarks/predictor_study.py", "lost": LOST, "draws": DRAWS, **found}
    write("predictor", record)

    from predictor_pages import draw

    print(draw(record, FIGURES / "predictor.png"))


if __name__ == "__main__":
    main()
