"""`hf-actcompress inspect`: a model's layers, where it would be cut, and the bytes that codecs leave there."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..codecs import parse_codec
from ..config import PLACEMENTS, CompressionArguments
from ..plan.inspection import Inspected, cut_sizes, describe, inspect_model
from .common import make_console, make_table, whole

INSPECT_CODECS = (
    "uniform:bits=8", "sort:bits=8", "kmeans:bits=4", "block:bits=4", "block:bits=2,rotate=hadamard,levels=gauss",
    "topk:ratio=0.1", "lowrank:rank=8",
)  # fmt: skip


def add_parser(commands: Any) -> None:
    what = "a model's layers, where --first and --last cut it, and the bytes that codecs leave there"
    parser = commands.add_parser("inspect", help=what, description=f"Shows {what}. Nothing is trained and no weights "
                                 "are downloaded; of a hub id only the configuration is needed.")  # fmt: skip
    add = parser.add_argument
    add("model", metavar="MODEL", help="'minilm' or 'efficientnet-lite0' (packaged), a timm name, a local folder, or "
        "the hub id of a transformers model that classifies texts or images")  # fmt: skip
    add("--first", type=whole(0), default=1, metavar="K", help="cut the outputs of the first K layers (default 1; 0 "
        "leaves that end alone)")  # fmt: skip
    add("--last", type=whole(0), default=1, metavar="N", help="cut the inputs of the last N layers (default 1)")
    add("--placement", choices=PLACEMENTS, default="every", help="'every' of those layers, or only the two 'cuts' of "
        "a pipeline: after layer K-1 and before the last N (default every)")  # fmt: skip
    add("--layers", metavar="JSON", help="overrides and more cuts by glob, each with its own codec: "
        "'{\"encoder.layer.3\": \"sort:bits=8\"}'")  # fmt: skip
    add("--stack", choices=("encoder", "decoder"), help="only this stack of an encoder-decoder")
    add("--codec", nargs="+", action="extend", metavar="SPEC", help="codecs to compare, given after MODEL (default "
        f"{' '.join(INSPECT_CODECS)})")  # fmt: skip
    add("--batch-size", type=whole(1), default=32, metavar="B", help="examples in the batch (default 32)")
    add("--seq-len", type=whole(1), default=128, metavar="L", help="tokens of an example (default 128)")
    add("--image-size", type=whole(1), default=224, metavar="S", help="height and width of an image (default 224)")
    add("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=_inspect)


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
    table = make_table(title, ["#", *left[:-1], "calls", "MB", left[-1]], left)
    marks = {id(cut["layer"]): " and ".join(cut["cut"]) for cut in cuts}
    for layer in found.layers:
        mark = marks.get(id(layer), "")
        values = describe(layer)
        place = [str(layer.index), *([layer.stack] if stacks else []), layer.name, layer.kind]
        output = [layer.output, "x".join(map(str, layer.shape or ("-",)))]
        numbers = [str(layer.calls), _mega(values["raw_bytes"])]
        table.add_row(*place, *output, *numbers, mark, style="bold cyan" if mark else None)
    make_console().print(table)


def _print_cuts(cuts: list[dict[str, Any]]) -> None:
    if not cuts:
        print("No cuts: --first 0 and --last 0 without --layers leave the model alone.")
        return
    table = make_table("What the codecs leave at each cut", ["cut", "codec", "bytes", "MB", "ratio"], ["cut", "codec"])
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
    make_console().print(table)


def _mega(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e6:.3f}"
