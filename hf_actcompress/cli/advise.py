"""`hf-actcompress advise`: which codec a pipeline should send with, and when not to compress."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from typing import Any

from ..plan.cluster import CODECS, NEAR, Cluster, bandwidth, parse_codecs, read_cluster, seconds
from ..plan.schedules import SCHEDULES
from ..plan.simulate import Link, Stage
from .common import MODEL, Help, make_console, make_progress, percent, print_json, print_table, whole

EXAMPLES = """examples:
  hf-actcompress advise --model minilm --bandwidth 100mbit
  hf-actcompress advise --model mobilenetv2_100 --bandwidth 1gbit --latency 20ms --cuts 0 --batch-size 16
  hf-actcompress advise --reduce --model minilm --processes 4 --bandwidth 100mbit
  hf-actcompress advise cluster.yaml --timeline --png step.png

A cluster that does not exist yet, as YAML (docs/advise.md lists every key):
  microbatches: 128
  devices:
    - {name: host, count: 64, flops: 20T}
  stages:
    - {count: 64, flops: 200G, activation: [4, 512, 4096], dtype: bf16}
  links: {bandwidth: 300mbit, latency: 30ms}
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "advise", help="the codec for a pipeline over a slow link, and whether to compress at all",
        description="Predicts the time of a training step for each codec, and says which to take, or to send "
        "uncompressed. Measures codecs and, with --model, forward and backward of every stage on this machine (with "
        "OMP_NUM_THREADS threads), then simulates a step event by event. Nothing is sent and no weights are "
        f"downloaded. Of codecs within {100 * NEAR:.0f} % of the fastest, the most faithful is taken: the first in "
        "the list.",
        epilog=EXAMPLES, formatter_class=Help,
    )  # fmt: skip
    add = parser.add_argument
    add("cluster", nargs="?", metavar="CLUSTER.yaml", help="description of devices, stages and links; or --model and "
        "--bandwidth")  # fmt: skip
    add("--model", help=f"{MODEL}; its stages are measured here")
    add("--reduce", action="store_true", help="advise on the gradients of data-parallel processes, not on a pipeline")
    add("--processes", type=whole(2), default=2, metavar="N", help="data-parallel processes, with --reduce (default "
        "2); --batch-size is of each")  # fmt: skip
    add("--bandwidth", metavar="RATE", help="of every link, in each direction: 100mbit, 1gbit, 12.5MB (per second)")
    add("--latency", metavar="TIME", default="0ms", help="of every link, one way: 20ms (default 0)")
    add("--stages", type=whole(2), metavar="N", help="with about as many layers each (default 2; 4 for zbv and "
        "interleaved, which have two on each device)")  # fmt: skip
    add("--cuts", type=whole(0), nargs="+", metavar="LAYER", help="cut after these layers instead; 'hf-actcompress "
        "inspect MODEL' numbers them")  # fmt: skip
    add("--compute", nargs="+", metavar="F/B", help="seconds of forward and backward of a micro-batch, for each "
        "stage, instead of measuring: 0.1/0.2 0.1/0.2")  # fmt: skip
    add("--background", type=whole(0), default=0, metavar="N", help="processes that compute the same while the stages "
        "are measured, for ranks that will share a machine (default 0: each has a machine of its own)")  # fmt: skip
    add("--batch-size", type=whole(1), default=32, metavar="B", help="examples of a step (default 32)")
    add("--microbatches", type=whole(1), default=8, metavar="M", help="parts that the batch is cut into (default 8)")
    add("--seq-len", type=whole(1), default=128, metavar="L", help="tokens of an example (default 128)")
    add("--image-size", type=whole(1), default=224, metavar="S", help="height and width of an image (default 224)")
    schedules = "; ".join(f"{name}: {schedule.what}" for name, schedule in SCHEDULES.items())
    add("--schedule", choices=list(SCHEDULES), default="early-1f1b", help=f"{schedules} (default early-1f1b)")
    add("--ahead", type=whole(0), default=2, metavar="N", help="micro-batches begun in advance for each link, of "
        "early-1f1b (default 2)")  # fmt: skip
    add("--codec", nargs="+", metavar="SPEC[/SPEC]", help="specs to compare, of activations, and of gradients after a "
        f"slash; 'bf16' casts (default: {percent('; '.join(CODECS))})")  # fmt: skip
    add("--timeline", action="store_true", help="draw the step without compression and with the codec to take")
    add("--png", metavar="FILE", help="write the same as a chart (needs matplotlib)")
    add("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=_advise)


def _advise(args: argparse.Namespace) -> None:
    if args.reduce:
        _advise_reduce(args)
        return
    if (args.cluster is None) == (args.model is None):
        raise ValueError("give either the YAML file of a cluster, or --model with --bandwidth.")
    from ..plan.advise import choose, predict, verdict
    from ..plan.timeline import chart

    with make_progress() as progress:
        cluster = _measured(args, progress) if args.cluster is None else read_cluster(args.cluster)
        if args.codec:
            pairs = {spec: spec.split("/") if "/" in spec else spec for spec in args.codec}
            cluster = replace(cluster, codecs=parse_codecs(pairs, "--codec"))
        task = progress.add_task("codecs", total=len(cluster.codecs))

        def tick(label: str) -> None:
            progress.update(task, description=f"codec {label}", advance=1)

        predictions = predict(cluster, tick=tick)
    words, chosen = verdict(predictions), choose({p.label: p.seconds for p in predictions})
    plain = predictions[0]
    shown = [plain] + [p for p in predictions if p.label == chosen and p is not plain]
    if args.json:
        print_json(_record(cluster, predictions, chosen, words))
    else:
        _print(cluster, predictions, chosen)
        if args.timeline:
            _draw(cluster, shown)
        make_console().print(words)
    if args.png:
        path = chart([(p.label, p.timeline) for p in shown], cluster.devices, args.png)
        print(f"written: {path}", file=sys.stderr)


def _advise_reduce(args: argparse.Namespace) -> None:
    if args.model is None or args.bandwidth is None or args.cluster is not None:
        raise ValueError("--reduce needs --model and --bandwidth, and no YAML file.")
    from ..plan.contention import background_load
    from ..plan.measure import measure_stages
    from ..plan.reduce import CODECS as REDUCED
    from ..plan.reduce import predict_reduce, verdict_reduce

    link = Link(bandwidth(args.bandwidth, "--bandwidth"), seconds(args.latency, "--latency"))
    if args.compute:
        (stage,) = _given(args.compute, 1)
        build = partial(stages_by_name, args.model, args.seq_len, args.image_size, 1, {"stages": 1})
        parameters = _count(build())
    else:
        build = partial(stages_by_name, args.model, args.seq_len, args.image_size, args.batch_size, {"stages": 1})
        work = build()
        with background_load(args.background, build):
            (stage,), _, _ = measure_stages(work, repeats=3)
        parameters = _count(work)
    codecs = {spec: None if spec == "none" else spec for spec in ("none", *args.codec)} if args.codec else REDUCED
    compute = stage.forward + stage.backward + stage.optimizer
    found = predict_reduce(parameters, args.processes, link, compute, codecs)
    label, words = verdict_reduce(found)
    if args.json:
        print_json({"processes": args.processes, "parameters": parameters, "take": label, "advice": words,
                    "codecs": [{**vars(p), "seconds": p.seconds} for p in found]})  # fmt: skip
        return
    rows = [[p.label, _time(p.seconds), f"{args.processes * args.batch_size / p.seconds:.3g}", _time(p.compute),
             _time(p.link), _time(p.coding), f"{p.nbytes / 1e6:.3f}", "take this" if p.label == label else ""]
            for p in found]  # fmt: skip
    print_table(
        f"{args.processes} processes, {parameters / 1e6:.1f}M parameters",
        ["reduce", "step", "samples/s", "computation", "link", "coding", "MB", ""], rows,
        keys=("reduce", ""), drop=("coding", "computation", "MB", "samples/s"),
        styles=["bold cyan" if p.label == label else None for p in found],
    )  # fmt: skip
    make_console().print(words)


def _count(work: Any) -> int:
    return sum(p.numel() for stage in work.stages for p in stage.parameters())


def _measured(args: argparse.Namespace, progress: Any) -> Cluster:
    """The cluster of --model and --bandwidth: a device like this one for each stage, or for each two."""
    if args.bandwidth is None:
        raise ValueError("--model needs --bandwidth, such as --bandwidth 100mbit.")
    link = Link(bandwidth(args.bandwidth, "--bandwidth"), seconds(args.latency, "--latency"))
    if args.stages and args.cuts:
        raise ValueError("give either --stages or --cuts.")
    if args.batch_size % args.microbatches:
        raise ValueError(f"--batch-size {args.batch_size} is not a multiple of --microbatches {args.microbatches}.")
    two = args.schedule in ("zbv", "interleaved")  # stages on each device
    count = len(args.cuts) + 1 if args.cuts else args.stages or (4 if two else 2)
    if two and count % 2:
        raise ValueError(f"--schedule {args.schedule} has two stages on each device here; {count} stages do not fit.")
    given = _given(args.compute, count) if args.compute else []
    from ..plan.advise import measured_cluster

    rows = args.batch_size // args.microbatches
    where = {"cuts": args.cuts} if args.cuts else {"stages": count}
    work = partial(stages_by_name, args.model, args.seq_len, args.image_size, rows, where)
    task = progress.add_task("forward and backward of the stages", total=None)
    try:
        return measured_cluster(
            work, link, microbatches=args.microbatches, rows=rows, schedule=args.schedule,
            devices=count // 2 if two else count, ahead=args.ahead, background=args.background, given=given,
            tick=lambda total: progress.update(task, total=total, advance=1),
        )  # fmt: skip
    except (RuntimeError, IndexError, AssertionError) as error:
        raise ValueError(
            f"A stage of {args.model!r} does not run with --batch-size {args.batch_size}, --seq-len {args.seq_len} "
            f"and --image-size {args.image_size}: {str(error).splitlines()[0]}"
        ) from None


def stages_by_name(model: str, seq_len: int, image_size: int, rows: int, where: dict[str, Any]) -> Any:
    """The stages of a model by its name, and what goes into them for a micro-batch of `rows` (plan.measure.Work)."""
    import torch

    from ..pipeline import split
    from ..plan.measure import Work
    from ..workloads.by_name import build_by_name

    named = build_by_name(model, seq_len=seq_len, image_size=image_size)
    modules = split(named.build(), example_inputs=named.inputs(1, "cpu"), **where)
    batch = named.inputs(rows, "cpu")
    if isinstance(batch, torch.Tensor):
        return Work(modules, (batch,), {})
    first, *others = batch
    return Work(modules, (batch[first],), {name: batch[name] for name in others})


def _given(pairs: list[str], count: int) -> list[Stage]:
    """The stages of --compute."""
    if len(pairs) != count:
        raise ValueError(f"--compute gives {len(pairs)} stages; there are {count}.")
    found = []
    for pair in pairs:
        both = pair.split("/")
        if len(both) != 2:
            raise ValueError(f"--compute: {pair!r} is not the seconds of forward and backward, such as 0.1/0.2.")
        found.append(Stage(*(seconds(value, "--compute") for value in both)))
    return found


def _record(cluster: Cluster, predictions: list[Any], chosen: str, words: str) -> dict[str, Any]:
    return {
        "schedule": cluster.schedule, "microbatches": cluster.microbatches, "rows": cluster.rows,
        "stages": [vars(stage) for stage in cluster.stages],
        "codecs": [
            {"codec": p.label, "specs": list(p.codecs), "seconds": p.seconds,
             "samples_per_second": p.samples_per_second, "limit_seconds": p.limit, "bubble": p.timeline.bubble,
             "bytes_forward": p.nbytes[0], "bytes_backward": p.nbytes[1],
             "links": {f"{cluster.devices[a]} > {cluster.devices[b]}": p.timeline.busy((a, b))
                       for a, b in p.timeline.links}}
            for p in predictions
        ],
        "take": chosen, "advice": words,
    }  # fmt: skip


def _print(cluster: Cluster, predictions: list[Any], chosen: str) -> None:
    slowest = max(cluster.stages, key=lambda stage: stage.forward + stage.backward)
    rows = []
    for p in predictions:
        links = [p.timeline.busy(way) for way in p.timeline.links]
        rows.append([p.label, _time(p.seconds), f"{p.samples_per_second:.3g}", f"{p.nbytes[0] / 1e6:.3f}",
                     f"{p.nbytes[1] / 1e6:.3f}", f"{100 * p.timeline.bubble:.0f} %",
                     f"{100 * max(links, default=0.0):.0f} %", f"{p.limit / p.seconds:.2f}",
                     "take this" if p.label == chosen else ""])  # fmt: skip
    print_table(
        f"{len(cluster.stages)} stages on {len(cluster.devices)} devices, {cluster.microbatches} micro-batches of "
        f"{cluster.rows}, {cluster.schedule}; slowest stage {_time(slowest.forward)} forward, "
        f"{_time(slowest.backward)} backward",
        ["codec", "step", "samples/s", "MB forward", "MB backward", "waiting", "link", "of limit", ""], rows,
        keys=("codec", ""), drop=("of limit", "MB backward", "MB forward", "waiting", "link", "samples/s"),
        styles=["bold cyan" if p.label == chosen else None for p in predictions],
    )  # fmt: skip
    make_console().print(
        "MB: of a step, on the first link. waiting: share of all devices' time. link: share of the step in which the "
        "busiest link carries bytes. of limit: the shortest possible step (computation of the busiest device, or "
        "bytes over bandwidth of the busiest link) over this one.\n", style="dim",
    )  # fmt: skip


def _draw(cluster: Cluster, shown: list[Any]) -> None:
    from rich.text import Text

    from ..plan.timeline import text

    console = make_console()
    for p in shown:
        lines = text(p.timeline, cluster.devices, max(20, min(console.width, 160) - 26))
        console.print(f"{p.label}: {_time(p.seconds)}", style="bold")
        for label, pieces in lines:
            console.print(Text.assemble(f"{label[:24]:24} ", *pieces), soft_wrap=True)
        console.print()
    console.print("F forward, B backward (I inputs, W weights), e encode, d decode, = on the link, o optimizer, . "
                  "waiting\n", style="dim")  # fmt: skip


def _time(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"
