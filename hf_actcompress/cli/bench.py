"""`hf-actcompress bench`: size, error and speed of codecs on one made-up tensor."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .common import make_console, make_progress, parse_codecs, print_json, print_table, shape_of, whole

BENCH_CODECS = (
    "identity", "float8", "uniform:bits=8", "sort:bits=8", "kmeans:bits=4", "block:bits=8,round=stochastic",
    "block:bits=4", "rotated:bits=2", "topk:ratio=0.1",
    "topk:ratio=0.1|uniform:bits=8", "ef+topk:ratio=0.1", "lowrank:rank=8",
)  # fmt: skip
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_parser(commands: Any) -> None:
    what = "size, error and speed of codecs on one made-up tensor"
    parser = commands.add_parser(
        "bench", help=what, description=f"Measures {what}. Each repeat times x.clone(), encode, decode and roundtrip "
        "in turn, so that other load on the machine slows all of them alike. Times are medians, in milliseconds and "
        "as multiples of the clone, with the 10th to the 90th percentile of the multiple. HF_ACTCOMPRESS_KERNELS=0 "
        "measures codecs in plain torch, without C++ and Triton.",
    )  # fmt: skip
    add = parser.add_argument
    add("codecs", nargs="*", metavar="CODEC", help="specs such as block:bits=4 (default: a set with every codec)")
    add("--shape", type=shape_of, default=(4096, 1024), metavar="AxB", help="of the tensor (default 4096x1024)")
    add("--dtype", choices=list(DTYPES), default="fp32", help="of the tensor (default fp32)")
    add("--distribution", choices=("gaussian", "heavy", "relu"), default="gaussian", help="of the values: 'heavy' is "
        "Student's t with 3 degrees of freedom, 'relu' a Gaussian whose negative half is 0 (default gaussian)")
    add("--repeats", type=whole(1), default=15, metavar="N", help="timed rounds, after one that warms up (default 15)")
    add("--device", default="cpu", help="where the tensor is (default cpu)")
    add("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> None:
    import torch

    from ..codecs import codec_names
    from ..plan.bench import measure, sample

    known = {spec.partition(":")[0] for spec in BENCH_CODECS}
    specs = args.codecs or [*BENCH_CODECS, *(name for name in codec_names() if name not in known)]
    codecs = parse_codecs(specs, "CODEC")
    try:
        x = sample(args.shape, getattr(torch, DTYPES[args.dtype]), args.distribution, args.device)
    except (RuntimeError, AssertionError) as error:  # torch's ways of refusing a device
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    rows = []
    with make_progress() as progress:
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
        print_json({**about, "codecs": rows})
    else:
        _print(about, rows)


def _print(about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    from ..plan.bench import TIMED

    gap = "  " if make_console().width >= 160 else "\n"
    lines = []
    for row in rows:
        if "reason" in row:
            lines.append([row["codec"], *"-" * 6])
            continue
        lines.append([row["codec"], f"{row['ratio']:.2f}", f"{row['rel_error']:.4f}", f"{row['cosine']:.5f}"])
        for time in (row[name] for name in TIMED):
            low, mid, high = (_short(time[key]) for key in ("clones_p10", "clones", "clones_p90"))
            lines[-1].append(gap.join((f"{_short(time['ms'])} ms", f"{mid}x", f"({low}-{high})")))
    shape = "x".join(map(str, about["shape"]))
    print_table(
        f"{shape} {about['dtype']} {about['distribution']} on {about['device']}, {about['threads']} threads, medians "
        f"of {about['repeats']}; times in ms, and as multiples of x.clone() with p10-p90",
        ["codec", "ratio", "error", "cosine", *TIMED], lines, drop=("cosine", "roundtrip", "decode", "encode"),
    )  # fmt: skip
    for row in rows:
        if "reason" in row:
            print(f"note: {row['codec']}: {row['reason']}", file=sys.stderr)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 1 else f"{value:.2f}"
