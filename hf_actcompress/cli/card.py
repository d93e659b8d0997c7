"""`hf-actcompress card`: what models cost and what they are worth, side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from .common import make_console, make_table, whole

EXAMPLES = """MODEL is a folder that save_pretrained, save_pruned, save_quantized, save_few_bits or save_compressed has
written, or a name: 'minilm', 'efficientnet-lite0', a timm name, 'torchvision:googlenet'. NAME=MODEL gives it a name in
the table.

examples:
  hf-actcompress card outputs/prune/dense outputs/prune/structured outputs/prune/int8 --data ../shared/data/cifar10
  hf-actcompress card big=outputs/glue small=outputs/distill --data nyu-mll/glue --task sst2 --output card
"""


def add_parser(commands: Any) -> None:
    what = "size, error, speed, memory and energy of models, side by side"
    parser = commands.add_parser(
        "card", help=what, description=f"Shows {what}: parameters, those that are not zero, bits, bytes of the file, "
        "FLOPs, error or metrics on a data set, peak memory, latency per sample with its 95th percentile, throughput, "
        "CPU time and energy, and what was gained against the first model. Models take turns while they are timed.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="the first is what the others are compared with")
    add("--data", default="embedded", help="'embedded', a local folder, or a hub id: its evaluation split is measured")
    add("--task", help="configuration of a hub data set, such as sst2")
    add("--max-samples", type=whole(1), metavar="N", help="evaluate on this many rows only (default all)")
    add("--image-size", type=whole(1), metavar="S", help="pixels squared (default: what the model was saved with)")
    add("--max-length", type=whole(1), default=128, metavar="L", help="tokens of a text at most (default 128)")
    add("--batch-sizes", type=whole(1), nargs="+", default=[1, 32], metavar="B", help="that are timed (default 1 32)")
    add("--repeats", type=whole(1), default=20, metavar="N", help="timed forwards a batch size (default 20)")
    add("--watts", type=float, default=15.0, metavar="W", help="power of one busy core, to estimate energy where no "
        "power counter can be read (default 15)")  # fmt: skip
    add("--device", default="cpu", help="default cpu")
    add("--threads", type=whole(1), metavar="N", help="of torch (default: torch's own)")
    add("--output", type=Path, metavar="FOLDER", help="also write card.json, card.md and card.png there")
    add("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_card)


def _card(args: argparse.Namespace) -> None:
    import torch

    from ..weights import card
    from ..workloads import environment

    if args.threads:
        torch.set_num_threads(args.threads)
    status = Console(stderr=True).status("loading")
    with status:
        kind, data, candidates = "", None, []
        for spec in args.models:
            name, _, where = spec.rpartition("=")
            status.update(f"loading {where}")
            found = _kind(where)
            if data is None:
                kind, data = found, _data(found, args)
            if found != kind:
                raise ValueError(f"{where} takes {found}, {args.models[0]} takes {kind}: one card compares models of "
                                 "one kind.")  # fmt: skip
            model, folder, bits = load(where, data, kind)
            candidates.append(card.Candidate(name or _short(where), model.to(args.device).eval(), folder, bits))
        make = _images if kind == "images" else _texts
        evaluation, metrics = make(data, candidates, args)
        example = {k: v.to(args.device) for k, v in evaluation[0].items()}
        cards = card.measure(candidates, example, evaluation, metrics, batch_sizes=args.batch_sizes,
                             repeats=args.repeats, watts=args.watts, tick=status.update)  # fmt: skip
    about = {"data": data.source, "samples": cards[0]["evaluated"], "repeats": args.repeats, "device": args.device,
             "threads": torch.get_num_threads(), "environment": environment()}  # fmt: skip
    if args.json:
        print(json.dumps({**about, "models": cards}, indent=2))
    else:
        names, lines = card.table(cards)
        title = (f"{data.source}, {about['samples']} samples; {args.device}, {about['threads']} threads, medians of "
                 f"{args.repeats} forwards")  # fmt: skip
        out = make_table(title, ["", *names], [""])
        for line in lines:
            out.add_row(*line)
        make_console().print(out)
        for each in cards:
            for note in each["notes"]:
                print(f"note: {each['name']}: {note}")
    if args.output is not None:
        for path in card.save_cards(cards, args.output, about):
            print(f"written: {path}")


def load(where: str, data: Any, kind: str) -> tuple[Any, Path | None, int | None]:
    """(model, its folder, bits that its file counts) of a folder or a name.  Raises ValueError."""
    from ..weights import checkpoint, manifest, quantize, weight_only
    from ..workloads import load_image_model, load_text_model

    folder, loader = Path(where).expanduser(), load_image_model if kind == "images" else load_text_model
    if not folder.is_dir():
        if folder.is_absolute() or where.startswith("."):
            raise ValueError(f"There is no folder {where}.")
        return loader(where, data.num_labels)[0], None, None
    if quantize.is_quantized(folder):
        return quantize.load_quantized(folder), folder, None
    if (folder / checkpoint.FILE_NAME).is_file():
        model, structure = manifest.build(folder), checkpoint.read_manifest(folder)["structure"]
        if isinstance(structure, dict) and "shapes" in structure:
            manifest.apply_shapes(model, structure)
        checkpoint.load_compressed(folder, model)
        return model, folder, 8 * (folder / checkpoint.FILE_NAME).stat().st_size
    if weight_only.is_few_bits(folder):
        return weight_only.load_few_bits(folder), folder, 8 * (folder / weight_only.WEIGHTS).stat().st_size
    if manifest.is_pruned(folder):
        return manifest.load_pruned(folder), folder, None
    return loader(where, data.num_labels)[0], folder, None


def _short(where: str) -> str:
    return Path(where).expanduser().resolve().name if Path(where).expanduser().is_dir() else where


def _kind(where: str) -> str:
    """Whether a model takes images or texts, by its configuration or name."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    from ..weights.manifest import register_vision
    from ..workloads import models

    folder = Path(where).expanduser()
    if not folder.is_dir() and "/" in where and not where.startswith((".", "/", "~")):
        from ..plan.inspection import _classifier

        return "images" if _classifier(where)[1].__name__.endswith("ImageClassification") else "texts"
    if not folder.is_dir():
        return "texts" if where in (models.MINILM, models.TINY_BERT) else "images"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{where} has no config.json, which says what the model is.")
    register_vision()
    config = AutoConfig.from_pretrained(folder)
    text = type(config) in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    return "texts" if text else "images"


def _data(kind: str, args: argparse.Namespace) -> Any:
    from ..workloads import load_images, load_text

    load_data = load_images if kind == "images" else load_text
    return load_data(args.data, args.task, max_train=1, max_eval=args.max_samples)


def _images(data: Any, candidates: Sequence[Any], args: argparse.Namespace) -> tuple[list[Any], Any]:
    import dataclasses

    from ..workloads import collate_images, prepare_images
    from ..workloads.models import _stored_preprocessing

    first = candidates[0]
    wants = _stored_preprocessing(first.model.config, str(first.folder))
    if args.image_size:
        wants = dataclasses.replace(wants, size=args.image_size)
    _, rows = prepare_images(data, wants)
    return _batches(rows, collate_images, max(args.batch_sizes)), None


def _texts(data: Any, candidates: Sequence[Any], args: argparse.Namespace) -> tuple[list[Any], Any]:
    from types import SimpleNamespace

    from transformers import AutoTokenizer, DataCollatorWithPadding

    from ..workloads import build_compute_metrics, tokenize_splits
    from ..workloads.models import _packaged_minilm

    folders = [c.folder for c in candidates if c.folder is not None and any(c.folder.glob("tokenizer*"))]
    tokenizer = AutoTokenizer.from_pretrained(folders[0] if folders else _packaged_minilm())
    _, rows = tokenize_splits(data, tokenizer, args.max_length)
    compute = build_compute_metrics(data.task, data.num_labels)
    batches = _batches(rows, DataCollatorWithPadding(tokenizer), max(args.batch_sizes))
    return batches, lambda logits, labels: compute(SimpleNamespace(predictions=logits, label_ids=labels))


def _batches(rows: Any, collate: Any, size: int) -> list[Any]:
    return [dict(collate([rows[i] for i in range(start, min(start + size, len(rows)))]))
            for start in range(0, len(rows), size)]  # fmt: skip
