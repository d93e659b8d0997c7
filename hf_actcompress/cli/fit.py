"""`hf-actcompress fit`: whether a model trains in so much memory, with which method, and the lines for it."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .common import print_json, print_table, whole


def add_parser(commands: Any) -> None:
    what = "what training a model takes, by method: memory, largest batch, and the lines to paste"
    parser = commands.add_parser("fit", help=what, description=f"Shows {what}. A training step is counted without "
                                 "values: nothing is allocated, no weights are downloaded.")  # fmt: skip
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder with config.json, a kind of transformers (llama, gpt2, vit), a class "
        "by name, a timm model, or a hub id whose configuration is at hand")  # fmt: skip
    add("--memory", metavar="SIZE", help="of the device, like 24GB or 16GiB: says what fits, the largest batch and "
        "the longest sequence")  # fmt: skip
    add("--batch-size", type=whole(1), default=8, metavar="N", help="rows (default 8)")
    add("--seq-len", type=whole(1), metavar="L", help="tokens of a row (default up to 512)")
    add("--image-size", type=whole(1), metavar="P", help="pixels, height and width (default the model's own)")
    add("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="of parameters and gradients (default fp32)")
    add("--autocast", action="store_true", help="bf16 autocast, as with the Trainer's bf16=True")
    add("--optimizer", default="adamw", choices=("adamw", "adafactor", "sgd", "sgd-momentum"),
        help="(default adamw)")  # fmt: skip
    add("--lora", nargs="+", metavar="KEY=VALUE", help="train LoRA adapters alone, with these options of peft's "
        "LoraConfig, like r=16")  # fmt: skip
    add("--config", nargs="+", metavar="KEY=VALUE", help="settings of the model's configuration, like "
        "num_hidden_layers=32")  # fmt: skip
    add("--device", default="cuda", choices=("cuda", "cpu"), help="whose operations are counted; it need not be there "
        "(default cuda)")  # fmt: skip
    add("--compile", action="store_true", help="also torch's activation_memory_budget")
    add("--calibrate", action="store_true", help="take the speeds of this machine first, for the estimated step")
    add("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=_fit)


def _pairs(items: list[str] | None, option: str) -> dict[str, Any] | None:
    """{"r": 16} of ["r=16"]: JSON where it is, else text."""
    import json

    if items is None:
        return None
    found = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not (key and equals and text):
            raise ValueError(f"{option} {item!r} is no KEY=VALUE, such as r=16.")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found


def _fit(args: argparse.Namespace) -> None:
    from ..plan.fit import fit

    found = fit(
        args.model, memory=args.memory, batch_size=args.batch_size, seq_len=args.seq_len, image_size=args.image_size,
        dtype=args.dtype, autocast=args.autocast, optimizer=args.optimizer, lora=_pairs(args.lora, "--lora"),
        config=_pairs(args.config, "--config"), device=args.device, compile=args.compile, calibrate=args.calibrate,
    )  # fmt: skip
    if args.json:
        print_json(found.to_dict())
        return
    best, limited = found.best, found.memory is not None
    names = ["method", *["fits", "rows", found.unit] * limited, "peak", "held", "step"]
    rows = []
    for row in found.rows:
        limits = [{True: "yes", False: "no", None: "-"}[row.fits], _number(row.rows), _number(row.size)] * limited
        rows.append([row.method, *limits, size(row.peak), size(row.held), f"{row.step:.2f}"])
    title = f"{found.model}: {found.batch_size} rows of {found.size} {found.unit}, {found.dtype}, {found.optimizer}"
    print_table(title, names, rows, drop=(found.unit, "held"),
                styles=["bold cyan" if row is best else None for row in found.rows])  # fmt: skip
    always = found.parameters + found.gradients + found.optimizer_state
    print(f"peak: of a step, in it {size(always)} of parameters, gradients and optimizer. held: between forward and "
          f"backward. step: over that of none, estimated ({found.speed}).")  # fmt: skip
    if limited:
        print(f"rows, {found.unit}: the most that {size(found.memory)} hold, of one with the other as given.")
    print()
    if best is None:
        print("No method fits. A smaller batch, LoRA (--lora r=16), bf16 or a lighter optimizer takes less.")
    elif best.snippets:
        print(f"{best.method}:")
        for name, code in best.snippets.items():
            print(f"\n# {name}\n{code}")
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
