"""`hf-actcompress card`: what models cost and what they are worth, side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .common import Help, print_json, print_table, whole

EXAMPLES = """
examples:
  hf-actcompress card outputs/prune/dense outputs/prune/structured outputs/prune/int8 --data data/cifar10
  hf-actcompress card big=outputs/glue small=outputs/distill --data nyu-mll/glue --task sst2 --output card
"""


def add_parser(commands: Any) -> None:
    what = "size, error, speed, memory and energy of models, side by side"
    parser = commands.add_parser(
        "card", help=what, description=f"Shows {what}: parameters, those that are not zero, bits, bytes of the file, "
        "FLOPs, error or metrics on a data set, peak memory, latency per sample with its 95th percentile, throughput, "
        "CPU time and energy, and what was gained against the first model. Models take turns while they are timed.",
        epilog=EXAMPLES, formatter_class=Help,
    )  # fmt: skip
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="folders that save_pretrained, save_pruned, save_quantized, "
        "save_few_bits or save_compressed have written, or names: 'minilm', 'efficientnet-lite0', a timm name, "
        "'torchvision:googlenet'. NAME=MODEL gives a name for the table. The others are compared with the first")
    add("--data", default="embedded", help="'embedded', a local folder, or a hub id: its evaluation split is measured")
    add("--task", help="configuration of a hub data set, such as sst2")
    add("--max-samples", type=whole(1), metavar="N", help="evaluate on this many rows only (default all)")
    add("--image-size", type=whole(1), metavar="S", help="height and width of an image (default: as the model was "
        "saved)")  # fmt: skip
    add("--max-length", type=whole(1), default=128, metavar="L", help="tokens of a text at most (default 128)")
    add("--batch-sizes", type=whole(1), nargs="+", default=[1, 32], metavar="B", help="batch sizes that are timed "
        "(default 1 32)")  # fmt: skip
    add("--repeats", type=whole(1), default=20, metavar="N", help="timed forwards a batch size (default 20)")
    add("--watts", type=float, default=15.0, metavar="W", help="power of one busy core, to estimate energy where no "
        "power counter can be read (default 15)")  # fmt: skip
    add("--device", default="cpu", help="where the models run (default cpu)")
    add("--threads", type=whole(1), metavar="N", help="threads of torch (default: torch's own number)")
    add("--output", type=Path, metavar="FOLDER", help="also write card.json, card.md and card.png there")
    add("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_card)


def _card(args: argparse.Namespace) -> None:
    import torch
    from rich.console import Console
    from rich.markup import escape

    from ..report.card import save_cards, table
    from ..weights import card
    from ..workloads import environment
    from ..workloads.batches import evaluation_batches
    from ..workloads.by_name import load_model, takes_images
    from ..workloads.data import load_images, load_text

    if args.threads:
        torch.set_num_threads(args.threads)
    status = Console(stderr=True).status("loading")
    with status:
        names = [spec.rpartition("=")[::2] for spec in args.models]
        images = [takes_images(where) for _, where in names]
        for (_, where), own in zip(names, images, strict=True):
            if own != images[0]:
                kinds = [("texts", "images")[kind] for kind in (own, images[0])]
                raise ValueError(f"{where} takes {kinds[0]}, {names[0][1]} takes {kinds[1]}: one card compares models "
                                 "of one kind.")  # fmt: skip
        data = (load_images if images[0] else load_text)(args.data, args.task, max_train=1, max_eval=args.max_samples)
        candidates = []
        for name, where in names:
            status.update(f"loading {escape(where)}")
            model, folder, bits = load_model(where, data.num_labels, images[0])
            candidates.append(card.Candidate(name or _short(where), model.to(args.device).eval(), folder, bits))
        first = candidates[0]
        evaluation, metrics = evaluation_batches(
            data, max(args.batch_sizes), folders=[c.folder for c in candidates if c.folder is not None],
            config=first.model.config if images[0] else None, image_size=args.image_size, max_length=args.max_length,
        )  # fmt: skip
        example = {k: v.to(args.device) for k, v in evaluation[0].items()}
        cards = card.measure(candidates, example, evaluation, metrics, batch_sizes=args.batch_sizes,
                             repeats=args.repeats, watts=args.watts, tick=lambda what: status.update(escape(what)))
    about = {"data": data.source, "samples": cards[0]["evaluated"], "repeats": args.repeats, "device": args.device,
             "threads": torch.get_num_threads(), "environment": environment()}  # fmt: skip
    if args.json:
        print_json({**about, "models": cards})
    else:
        columns, lines = table(cards)
        print_table(f"{data.source}, {about['samples']} samples; {args.device}, {about['threads']} threads, medians "
                    f"of {args.repeats} forwards", ["", *columns], lines, split=True)  # fmt: skip
    for each in cards:
        for note in each["notes"]:
            print(f"note: {each['name']}: {note}", file=sys.stderr)
    for path in save_cards(cards, args.output, about) if args.output is not None else ():
        print(f"written: {path}", file=sys.stderr)


def _short(where: str) -> str:
    return Path(where).expanduser().resolve().name if Path(where).expanduser().is_dir() else where
