"""`hf-actcompress inspect`: a model's layers, where it would be cut, and the bytes that codecs leave there."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from typing import Any

from ..config import ActCompressConfig
from .common import MODEL, make_console, parse_codecs, percent, print_json, print_table, whole

INSPECT_CODECS = (
    "uniform:bits=8", "sort:bits=8", "kmeans:bits=4", "block:bits=4", "rotated:bits=2",
    "topk:ratio=0.1", "lowrank:rank=8",
)  # fmt: skip
CUT = ("first", "last", "placement", "layers", "stack")  # fields of the configuration that are options here


def add_parser(commands: Any) -> None:
    what = "a model's layers, where --first and --last cut it, and the bytes that codecs leave there"
    parser = commands.add_parser("inspect", help=what, description=f"Shows {what}. Nothing is trained and no weights "
                                 "are downloaded; of a hub id only the configuration is needed.")  # fmt: skip
    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL)
    for field in fields(ActCompressConfig):
        if field.name in CUT:
            kind = {"type": whole(0), "metavar": "N"} if field.name in ("first", "last") else {}
            add(f"--{field.name}", default=field.default, choices=field.metadata.get("choices"),
                help=percent(field.metadata["help"]), **kind)  # fmt: skip
    add("--codec", nargs="+", action="extend", metavar="SPEC", help="codecs to compare, given after MODEL (default "
        f"{' '.join(INSPECT_CODECS)})")  # fmt: skip
    add("--batch-size", type=whole(1), default=32, metavar="B", help="examples in the batch (default 32)")
    add("--seq-len", type=whole(1), default=128, metavar="L", help="tokens of an example (default 128)")
    add("--image-size", type=whole(1), default=224, metavar="S", help="height and width of an image (default 224)")
    add("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> None:
    from ..plan.inspection import cut_sizes, describe, inspect_model
    from ..workloads.by_name import build_by_name

    codecs = parse_codecs(args.codec or INSPECT_CODECS, "--codec")
    options = {name: getattr(args, name) for name in CUT}
    nowhere = args.first == args.last == 0 and not args.layers
    config = None if nowhere else ActCompressConfig(str(codecs[0]), **options)
    named = build_by_name(args.model, seq_len=args.seq_len, image_size=args.image_size)
    found = inspect_model(named.build, named.inputs, args.batch_size, f"{args.model!r} with {named.example}")
    cuts = [] if config is None else cut_sizes(found.layers, config, codecs)
    batch = f"{args.batch_size} x {named.example}"
    layers = [describe(layer) for layer in found.layers]
    if args.json:
        print_json({"model": args.model, "class": found.model, "parameters": found.parameters, "inputs": batch,
                    "notes": found.notes, "layers": layers, "tied": found.tied,
                    "cuts": [{**cut, "layer": cut["layer"].name} for cut in cuts]})  # fmt: skip
        return
    marks = {cut["layer"].name: " and ".join(cut["cut"]) for cut in cuts}
    _print_layers(f"{args.model}: {found.model}, {found.parameters / 1e6:.1f}M parameters, {batch}", layers, marks)
    for name, numbers in found.tied.items():
        print(f"tied: layers {', '.join(map(str, numbers))} compute with {name}; pipeline stages that have it sum its "
              "gradients after each step.")  # fmt: skip
    notes = _print_cuts(cuts)
    for note in [*found.notes, *notes]:
        print(f"note: {note}", file=sys.stderr)


def _print_layers(title: str, layers: list[dict[str, Any]], marks: dict[str, str]) -> None:
    stacks = any(layer["stack"] for layer in layers)
    names = ["#", *["stack"] * stacks, "layer", "kind", "output", "shape", "calls", "MB", "cut"]
    rows = [
        [str(layer["index"]), *[layer["stack"] or ""] * stacks, layer["name"], layer["kind"], layer["output"],
         "x".join(map(str, layer["shape"] or ("-",))), str(layer["calls"]), _mega(layer["raw_bytes"]),
         marks.get(layer["name"], "")]
        for layer in layers
    ]  # fmt: skip
    print_table(title, names, rows, keys=("layer", "cut"), left=("stack", "kind", "output", "shape"),
                drop=("calls", "output", "kind", "stack", "shape", "#", "MB"),
                styles=["bold cyan" if row[-1] else None for row in rows])  # fmt: skip
    make_console().print("MB: of the layer's output for this batch.\n", style="dim")


def _print_cuts(cuts: list[dict[str, Any]]) -> list[str]:
    """Prints the table, and returns why some codecs cannot be used at some cuts."""
    if not cuts:
        print("No cuts: --first 0 and --last 0 without --layers leave the model alone.")
        return []
    rows, notes = [], []
    for cut in cuts:
        for number, size in enumerate(cut["codecs"]):
            head, nbytes = cut["layer"].name if number == 0 else "", size["payload_bytes"]
            if nbytes is None:
                rows.append([head, size["codec"], "-", "-", "-"])
                notes.append(f"{cut['layer'].name}: {size['reason']}")
            else:
                rows.append([head, size["codec"], f"{nbytes:,}", _mega(nbytes), f"{size['ratio']:.2f}"])
    print_table("What the codecs leave at each cut", ["cut after", "codec", "bytes", "MB", "ratio"], rows,
                keys=("cut after", "codec"), drop=("MB", "bytes"))  # fmt: skip
    return notes


def _mega(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e6:.3f}"
