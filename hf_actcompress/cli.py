"""`hf-actcompress`: look at a model's layers and cuts, and time codecs, before training anything.

Arguments and tables only; `inspection.py` and `bench.py` do the work.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import __version__
from .bench import DISTRIBUTIONS, TIMED, measure, sample
from .codecs import codec_names, parse_codec
from .codecs.compiled import SMALLEST, VARIABLE
from .config import PLACEMENTS, CompressionArguments
from .inspection import Inspected, cut_sizes, describe, inspect_model

INSPECT_CODECS = (
    "uniform:bits=8", "sort:bits=8", "kmeans:bits=4", "block:bits=4", "block:bits=2,rotate=hadamard,levels=gauss",
    "topk:ratio=0.1", "lowrank:rank=8",
)  # fmt: skip
BENCH_CODECS = (
    "identity", "float8", "uniform:bits=8", "sort:bits=8", "kmeans:bits=4", "block:bits=8,round=stochastic",
    "block:bits=4", "block:bits=2,rotate=hadamard,levels=gauss,allocate=energy", "topk:ratio=0.1",
    "topk:ratio=0.1|uniform:bits=8", "ef+topk:ratio=0.1", "lowrank:rank=8",
)  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXAMPLES = """examples:
  hf-actcompress inspect minilm --first 1 --last 2 --placement cuts
  hf-actcompress inspect mobilenetv2_100 --batch-size 64 --image-size 96 --codec block:bits=4 topk:ratio=0.2
  hf-actcompress bench block:bits=4 sort:bits=8 --shape 32x128x384
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The console script.  Returns the exit code: 0, or 2 after a ValueError, whose text goes to stderr."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        args.run(args)
    except ValueError as error:
        print(f"hf-actcompress {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-actcompress", description="Compress what training keeps and moves.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"hf_actcompress {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _inspect_parser(commands)
    _bench_parser(commands)
    return parser


def _inspect_parser(commands: Any) -> None:
    what = "a model's layers, where --first and --last cut it, and the bytes that codecs leave there"
    parser = commands.add_parser("inspect", help=what, description=f"Shows {what}. Nothing is trained and no weights "
                                 "are downloaded; of a hub id only the configuration is needed.")  # fmt: skip
    add = parser.add_argument
    add("model", metavar="MODEL", help="'minilm' or 'efficientnet-lite0' (packaged), a timm name, a local folder, or "
        "the hub id of a transformers model that classifies texts or images")  # fmt: skip
    add("--first", type=_whole(0), default=1, metavar="K", help="cut the outputs of the first K layers (default 1; 0 "
        "leaves that end alone)")  # fmt: skip
    add("--last", type=_whole(0), default=1, metavar="N", help="cut the inputs of the last N layers (default 1)")
    add("--placement", choices=PLACEMENTS, default="every", help="'every' of those layers, or only the two 'cuts' of "
        "a pipeline: after layer K-1 and before the last N (default every)")  # fmt: skip
    add("--layers", metavar="JSON", help="overrides and more cuts by glob, each with its own codec: "
        "'{\"encoder.layer.3\": \"sort:bits=8\"}'")  # fmt: skip
    add("--stack", choices=("encoder", "decoder"), help="only this stack of an encoder-decoder")
    add("--codec", nargs="+", action="extend", metavar="SPEC", help="codecs to compare, given after MODEL (default "
        f"{' '.join(INSPECT_CODECS)})")  # fmt: skip
    add("--batch-size", type=_whole(1), default=32, metavar="B", help="examples in the batch (default 32)")
    add("--seq-len", type=_whole(1), default=128, metavar="L", help="tokens of an example (default 128)")
    add("--image-size", type=_whole(1), default=224, metavar="S", help="height and width of an image (default 224)")
    add("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=_inspect)


def _bench_parser(commands: Any) -> None:
    what = "size, error and speed of codecs on one made-up tensor"
    parser = commands.add_parser(
        "bench", help=what, description=f"Measures {what}. Each repeat times x.clone(), encode, decode and roundtrip "
        "in turn, so that other load on the machine meets all of them; times are medians, with the 10th to the 90th "
        f"percentile of the multiple of the clone. Tensors of {SMALLEST} elements or more are timed with compiled "
        f"codecs, as a long training runs them; {VARIABLE}=0 measures them eager.",
    )  # fmt: skip
    add = parser.add_argument
    add("codecs", nargs="*", metavar="CODEC", help="specs such as block:bits=4 (default: a set with every codec)")
    add("--shape", type=_shape, default=(4096, 1024), metavar="AxB", help="default 4096x1024")
    add("--dtype", choices=list(DTYPES), default="fp32", help="default fp32")
    add("--distribution", choices=DISTRIBUTIONS, default="gaussian", help="'heavy' is Student's t with 3 degrees of "
        "freedom, 'relu' a Gaussian whose negative half is 0 (default gaussian)")  # fmt: skip
    add("--repeats", type=_whole(1), default=15, metavar="N", help="default 15, after one that warms up")
    add("--device", default="cpu", help="default cpu")
    add("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_bench)


def _whole(low: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {low} or more")
        return int(text)

    return convert


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.lower().split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 4096x1024")
    return tuple(map(int, sizes))


def _console() -> Console:
    # Tables that are piped into a file must not be folded to the 80 columns that rich assumes there.
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)


def _table(title: str, columns: Sequence[str], left: Sequence[str]) -> Table:
    """Columns of numbers, but for those in `left`, which hold text and are folded where the terminal is narrow."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for name in columns:
        number = name not in left
        table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


# inspect


def _inspect(args: argparse.Namespace) -> None:
    codecs = [parse_codec(spec) for spec in args.codec or INSPECT_CODECS]
    options = {name: getattr(args, name) for name in ("first", "last", "placement", "layers", "stack")}
    config = CompressionArguments(codec=str(codecs[0]), **options).to_config()
    sizes = {name: getattr(args, name) for name in ("batch_size", "seq_len", "image_size")}
    found = inspect_model(args.model, **sizes)
    cuts = cut_sizes(found.layers, config, codecs)
    if args.json:
        record = {"model": args.model, "class": found.model, "parameters": found.parameters, "inputs": found.inputs,
                  "notes": found.notes, "layers": [describe(layer) for layer in found.layers],
                  "cuts": [{**cut, "layer": cut["layer"].name} for cut in cuts]}  # fmt: skip
        print(json.dumps(record, indent=2))
        return
    _print_layers(args.model, found, cuts)
    _print_cuts(cuts)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)


def _print_layers(name: str, found: Inspected, cuts: list[dict[str, Any]]) -> None:
    title = f"{name}: {found.model}, {found.parameters / 1e6:.1f}M parameters, {found.inputs}"
    stacks = ["stack"] if any(layer.stack for layer in found.layers) else []
    left = [*stacks, "layer", "kind", "output", "shape", "cut here: this output is the"]
    table = _table(title, ["#", *left[:-1], "calls", "MB", left[-1]], left)
    marks = {id(cut["layer"]): " and ".join(cut["cut"]) for cut in cuts}
    for layer in found.layers:
        mark = marks.get(id(layer), "")
        values = describe(layer)
        place = [str(layer.index), *([layer.stack] if stacks else []), layer.name, layer.kind]
        output = [layer.output, "x".join(map(str, layer.shape or ("-",)))]
        numbers = [str(layer.calls), _mega(values["raw_bytes"])]
        table.add_row(*place, *output, *numbers, mark, style="bold cyan" if mark else None)
    _console().print(table)


def _print_cuts(cuts: list[dict[str, Any]]) -> None:
    if not cuts:
        print("No cuts: --first 0 and --last 0 without --layers leave the model alone.")
        return
    table = _table("What the codecs leave at each cut", ["cut", "codec", "bytes", "MB", "ratio"], ["cut", "codec"])
    for cut in cuts:
        head = f"{cut['layer'].name}\n{' and '.join(cut['cut'])}"
        for row in cut["codecs"]:
            if row["payload_bytes"] is None:
                table.add_row(head, row["reason"], "-", "-", "-")
            else:
                nbytes = row["payload_bytes"]
                table.add_row(head, row["codec"], f"{nbytes:,}", _mega(nbytes), f"{row['ratio']:.2f}")
            head = ""
        table.add_section()
    _console().print(table)


def _mega(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e6:.3f}"


# bench


def _bench(args: argparse.Namespace) -> None:
    known = {spec.partition(":")[0] for spec in BENCH_CODECS}
    specs = args.codecs or [*BENCH_CODECS, *(name for name in codec_names() if name not in known)]
    codecs = [parse_codec(spec) for spec in specs]
    try:
        x = sample(args.shape, DTYPES[args.dtype], args.distribution, args.device)
    except (RuntimeError, AssertionError) as error:  # torch's ways of refusing a device
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    if x.numel() >= SMALLEST:
        os.environ.setdefault(VARIABLE, "1")
    rows = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(codecs) * args.repeats)
        for number, codec in enumerate(codecs, 1):
            progress.update(task, description=str(codec))
            try:
                rows.append(measure(codec, x, args.repeats, lambda: progress.advance(task)))
            except ValueError as error:  # a rank above the number of features, for one
                rows.append({"codec": str(codec), "reason": str(error)})
            progress.update(task, completed=number * args.repeats)
    about = {"shape": list(args.shape), "dtype": args.dtype, "distribution": args.distribution,
             "device": args.device, "repeats": args.repeats, "threads": torch.get_num_threads()}  # fmt: skip
    if args.json:
        print(json.dumps({**about, "codecs": rows}, indent=2))
        return
    console, shape = _console(), "x".join(map(str, args.shape))
    gap = "  " if console.width >= 140 else "\n"
    table = _table(
        f"{shape} {args.dtype} {args.distribution} on {args.device}, {about['threads']} threads, medians of "
        f"{args.repeats}; times in ms, and as multiples of x.clone() with p10-p90",
        ["codec", "ratio", "error", "cosine", *TIMED], ["codec"],
    )  # fmt: skip
    for row in rows:
        if "reason" in row:
            table.add_row(row["codec"], *"-" * 6)
            continue
        cells = [row["codec"], f"{row['ratio']:.2f}", f"{row['rel_error']:.4f}", f"{row['cosine']:.5f}"]
        for time in (row[name] for name in TIMED):
            low, mid, high = (_short(time[key]) for key in ("clones_p10", "clones", "clones_p90"))
            cells.append(gap.join((f"{_short(time['ms'])} ms", f"{mid}x", f"({low}-{high})")))
        table.add_row(*cells)
    console.print(table)
    for row in rows:
        if "reason" in row:
            print(f"note: {row['reason']}", file=sys.stderr)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 1 else f"{value:.2f}"
