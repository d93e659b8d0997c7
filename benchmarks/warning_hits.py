"""How often the callback's warning is right: its rule over the runs of benchmarks/results/accuracy.

    python benchmarks/warning_hits.py

A run is harmed if it lost more than a tenth of what training without compression gains over a constant answer (a
Matthews correlation of 0, an accuracy of 0.5 or 0.1).  The errors are the means of the whole run, as its record has
them.  Writes benchmarks/results/warning_hits.json.
"""

from __future__ import annotations

import statistics

import harness

from hf_actcompress.codecs import Identity
from hf_actcompress.observe.warning import WARN_ERROR, warning_of

TASKS = {"cola": ("matthews_correlation", 0.0), "sst2": ("accuracy", 0.5), "cifar10": ("accuracy", 0.1)}
LOST = 0.1


def main() -> None:
    harness.arguments(__doc__).parse_args()
    rows = []
    for task, (metric, floor) in TASKS.items():
        records = harness.read_all(f"accuracy/{task}")
        none = statistics.mean(r["metrics"][metric]["plain"] for r in records if r["codec"] == "none")
        counts = {"task": task, "runs": 0, "harmed": 0, "warned": 0, "caught": 0}
        for record in records:
            if record["codec"] == "none":
                continue
            lost = (none - record["metrics"][metric]["compressed"]) / (none - floor)
            errors, codecs = {}, {}
            for row in record["compression"]:
                errors[row["boundary"], row["direction"]] = row["rel_error"]
                # Whether it warns does not depend on the codec, and records of version 0.1 have old spellings.
                codecs[row["boundary"], row["direction"]] = Identity()
            warned = warning_of(errors, WARN_ERROR, codecs) is not None
            counts["runs"] += 1
            counts["harmed"] += lost > LOST
            counts["warned"] += warned
            counts["caught"] += warned and lost > LOST
        rows.append(counts)
    rows.append({"task": "all", **{key: sum(row[key] for row in rows) for key in rows[0] if key != "task"}})
    harness.write("warning_hits", {"limit": WARN_ERROR, "lost": LOST, "tasks": rows})
    for row in rows:
        print(f"{row['task']:8s} {row['runs']} runs, {row['harmed']} harmed, {row['warned']} warned of, of which "
              f"{row['caught']} harmed")  # fmt: skip


if __name__ == "__main__":
    main()
