"""`hf-actcompress analyze`: which layers of a model tolerate which codec, before anything is trained."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .common import MODEL, make_console, make_progress, parse_codecs, print_json, print_table, whole

ANALYZE_CODECS = (
    "uniform:bits=8", "sort:bits=8", "block:bits=8", "rotated:bits=8", "uniform:bits=4", "sort:bits=4",
    "kmeans:bits=4", "block:bits=4", "rotated:bits=4", "uniform:bits=2", "kmeans:bits=2", "block:bits=2",
    "rotated:bits=2",
)  # fmt: skip


def add_parser(commands: Any) -> None:
    what = "which layers tolerate which codec: the gradient's error with each codec at each layer"
    parser = commands.add_parser(
        "analyze", help=what, description=f"Shows {what}, one cut at a time, on a few training batches. Nothing is "
        "trained. The error is that of the parameters' gradient, as a mean over layers: at 0.01 the gradient is as "
        "good as exact, at 1 the noise is as large as the gradient.",
    )  # fmt: skip
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"{MODEL}; a timm name has random weights")
    add("data", metavar="DATA", help="'embedded' (comes with the package), a local folder, a hub id, or one of cola, "
        "sst2, rte, cifar10, mnist (from --data-root, else the hub)")  # fmt: skip
    add("--codec", nargs="+", action="extend", metavar="SPEC", help="codecs to compare, given after DATA (default "
        f"{' '.join(ANALYZE_CODECS)})")  # fmt: skip
    add("--batches", type=whole(1), default=2, metavar="N", help="the errors are means over N batches (default 2)")
    add("--batch-size", type=whole(1), default=16, metavar="B", help="examples in a batch (default 16)")
    add("--image-size", type=whole(8), default=96, metavar="S", help="height and width of an image (default 96)")
    add("--max-length", type=whole(1), default=128, metavar="L", help="tokens of an example at most (default 128)")
    add("--blocks", nargs="+", metavar="GLOB", help="the model's blocks as paths or globs, where none are found")
    add("--seed", type=whole(0), default=0, metavar="N", help="of the classifier's weights, the batches and the "
        "codecs (default 0)")  # fmt: skip
    add("--data-root", type=Path, default=Path("data"), metavar="DIR", help="folder that holds cifar10, mnist, "
        "glue/cola and the like (default data)")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="write analysis.json and the figures (needs matplotlib) there")
    add("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=_analyze)


def _analyze(args: argparse.Namespace) -> None:
    specs = [str(codec) for codec in parse_codecs(args.codec or ANALYZE_CODECS, "--codec")]
    from ..plan.study import study
    from ..workloads.batches import training_batches

    options = {name: getattr(args, name) for name in ("batches", "batch_size", "image_size", "max_length", "seed")}
    model, batches, about = training_batches(args.model, args.data, root=args.data_root, **options)
    with make_progress() as progress:
        task = progress.add_task(f"{args.model} on {args.data}", total=None)
        found = study(
            model, batches, specs, blocks=args.blocks, seed=args.seed, advance=lambda: progress.advance(task),
            begin=lambda total: progress.update(task, total=total),
        )  # fmt: skip
    record = {**about, "data_name": args.data, **found}
    if args.json:
        print_json(record)
    else:
        _print(record)
    for path in write(record, args.out) if args.out is not None else ():
        print(f"written: {path}", file=sys.stderr)


def write(record: dict[str, Any], folder: Path) -> list[Path]:
    """analysis.json, and the figures where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "analysis.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("note: no figures without matplotlib: pip install 'hf_actcompress[plots]'", file=sys.stderr)
        return [path]
    from ..report.figures import all_figures

    return [path, *all_figures(record, folder)]


def _print(record: dict[str, Any]) -> None:
    from ..report.figures import label

    console, rows = make_console(), record["map"]
    layers = list(dict.fromkeys((row["layer"], row["name"]) for row in rows))
    size = f"{record['class']}, {record['parameters'] / 1e6:.1f}M parameters"
    seen = f"{record['batches']} batches of {record['batch_size']}, {record['data']}"
    console.print(f"{record['model']}: {size}; {seen}\n")
    for direction, what in (("forward", "Activations"), ("backward", "Gradients")):
        lines = []
        for codec in record["codecs"]:
            own = {row["layer"]: row for row in rows if (row["codec"], row["direction"]) == (codec, direction)}
            ratio = sum(r["raw_bytes"] for r in own.values()) / sum(r["payload_bytes"] for r in own.values())
            lines.append([label(codec), f"{ratio:.1f}", *(_shade(own[index]["layer_error"]) for index, _ in layers)])
        print_table(f"{what} after layer ... compressed: error of the parameters' gradient",
                    ["codec", "ratio", *(str(index) for index, _ in layers)], lines, keys=("codec", "ratio"),
                    split=True)  # fmt: skip
    console.print("layers: " + ", ".join(f"{index} {name}" for index, name in layers))
    for codec, reason in record["left_out"].items():
        print(f"note: {codec} is left out: {reason}", file=sys.stderr)


def _shade(error: float | None) -> Any:
    from rich.text import Text

    if error is None or error != error:
        return Text("NaN", style="red")
    color = "green" if error < 0.1 else "yellow" if error < 0.5 else "red"
    return Text(f"{error:.2g}" if error < 1 else f"{error:.1f}", style=color)
