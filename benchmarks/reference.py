"""The tables of the work that this project began with: their rows, their figures, and the settings of our runs.

Data only; `tables.py` runs it.  `theirs` are the figures of "Epipe" (github.com/timmywanttolearn/gpipe_test), measured
by its authors on GTX 1080s.  A budget decides how large our side is:

    full   the original settings, for a machine with GPUs (weights and data from the hub where --data has none)
    cpu    packaged weights, some thousand examples, 2 epochs: minutes a run on one core
    smoke  a few steps of tiny models: shows that every row runs, its figures mean nothing
"""

from __future__ import annotations

from dataclasses import dataclass, field

import accuracy

BUDGETS = ("smoke", "cpu", "full")


@dataclass(frozen=True)
class Row:
    """One line of a table: its label there, our codec (both directions alike) and their figures as text."""

    label: str
    codec: str
    theirs: dict[str, str] = field(default_factory=dict)
    task: str = "cifar10"
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    title: str
    theirs: str  # their settings, in words
    rows: tuple[Row, ...]
    differs: str = ""  # what else differs, beside model, data and length
    throughput: tuple[int, int] | None = None  # (first, last): measure samples per second at these boundaries, too

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.task for row in self.rows))


CUTS = " --first 1 --last 1 --placement cuts"
TEXT_CUTS = " --first 1 --last 2 --placement cuts"
FULL_IMAGES = (
    "--model mobilenetv2_100 --image_size 224 --learning_rate 1e-3 --weight_decay 1e-4 --lr_scheduler_type cosine "
    "--dataloader_num_workers 8"
)
FULL_TEXT = "--model roberta-base --num_train_epochs 20 --learning_rate 2e-5 --per_device_train_batch_size 32"
CPU_IMAGES, CPU_TEXT = accuracy.TASKS["cifar10"][2], accuracy.TEXT
CPU_SCRATCH = CPU_IMAGES.replace("epochs 2", "epochs 8").replace("size 96", "size 64") + " --pretrained False"
SHORT = (
    "--max_steps 2 --per_device_train_batch_size 4 --per_device_eval_batch_size 8 --max_train_samples 16 "
    "--max_eval_samples 16"
)
TINY_IMAGES = f"{SHORT} --model resnet10t --image_size 32"
TINY_TEXT = f"{SHORT} --model tiny-bert --max_length 16"


@dataclass(frozen=True)
class Task:
    """How a task is trained: recipe, folder under --data, hub id, and the options of each budget."""

    recipe: str
    folder: str
    hub: tuple[str, ...]
    options: dict[str, str]


def _images(epochs: int, batch: int, cuts: str, cpu: str, more: str = " --pretrained True") -> Task:
    full = f"{FULL_IMAGES}{more} --num_train_epochs {epochs} --per_device_train_batch_size {batch}{cuts}"
    return Task("cifar", "cifar10", ("uoft-cs/cifar10",), {"full": full, "cpu": cpu, "smoke": TINY_IMAGES + cuts})


def _text(name: str, cpu: str) -> Task:
    options = {"full": FULL_TEXT + TEXT_CUTS, "cpu": cpu, "smoke": TINY_TEXT + TEXT_CUTS}
    return Task("glue", f"glue/{name}", ("nyu-mll/glue", "--task", name), options)


# Where the options of a budget equal those of another task here, or of benchmarks/accuracy.py, runs are shared.
TASKS = {
    "cifar10": _images(80, 256, CUTS, CPU_IMAGES),
    "cifar10, 40 epochs": _images(40, 256, CUTS, CPU_IMAGES),
    "cifar10, first 3 and last 2": _images(
        10, 64, " --first 3 --last 2 --placement every",
        CPU_IMAGES.replace(CUTS.strip(), "--first 3 --last 2 --placement every"),
    ),
    "cifar10 from scratch": _images(80, 256, CUTS, CPU_SCRATCH, " --pretrained False"),
    "cola": _text("cola", CPU_TEXT),
    "rte": _text("rte", CPU_TEXT.replace("epochs 2", "epochs 3")),
}  # fmt: skip


def _accuracy(**values: str) -> tuple[Row, ...]:
    """Rows of images: codec labels of `NAMES` and their accuracy."""
    return tuple(Row(NAMES[key][0], NAMES[key][1], {"accuracy, %": value}) for key, value in values.items())


def _glue(metric: str, task: str, **values: str) -> tuple[Row, ...]:
    return tuple(Row(NAMES[key][0], NAMES[key][1], {metric: value}, task) for key, value in values.items())


NAMES = {
    "none": ("no compression", "none"),
    **{f"u{b}": (f"uniform, {b} bits", f"uniform:bits={b}") for b in (16, 12, 11, 10, 9, 8, 4)},
    **{f"k{s}": (f"keep {s} %", f"topk:ratio=0.{s // 10}") for s in (50, 20)},
    "s8": ("8 bits in 8 separate splits", "block:bits=8,splits=8"),
    **{f"sort{b}": (f"sort, {b} bits, {s} of them splits", f"sort:bits={b},splits={s}")
       for b, s in ((4, 1), (8, 2), (12, 3), (16, 4))},
}  # fmt: skip
SORT_4_2 = Row("sort, 4 bits, 2 of them splits", "sort:bits=4,splits=2", {"accuracy, %": "52.2"}, "rte")
# Ranks are chosen by the ratio of the first cut, for they fold the tensor to pictures and we to channels.
SVD = (("14", "0.25", "102.4", "95.73", 8), ("12", "0.214", "106.2", "95.51", 7),
       ("8", "0.143", "125.5", "94.99", 5), ("6", "0.107", "136.9", "94.16", 3))  # fmt: skip
_FIRST3 = "cifar10, first 3 and last 2"

TABLES = {
    "vision": Table(
        "Pruning and uniform quantization, images", "MobileNetV2 on CIFAR-10, fine-tuned, 80 epochs, batch 256",
        _accuracy(none="96.1", u16="96.0", u12="95.4", u11="91.0 (unstable)", u10="68", u9="68", k50="96.1",
                  k20="95.2", s8="95.47"),
        "Their 10 and 9 bits are one figure for both.",
    ),
    "text": Table(
        "Pruning and uniform quantization, text", "RoBERTa-base, several seeds",
        _glue("MCC", "cola", none="0.638 ± 0.008", k50="0.633 ± 0.013", u16="0.632 ± 0.010", u10="0.635 ± 0.014",
              u8="0.634 ± 0.001", u4="0")
        + _glue("accuracy, %", "rte", none="78.4 ± 0.6", k50="79.3 ± 0.7", u16="78.7 ± 0.7", u10="78.3 ± 1.1",
                u8="77.5 ± 0.8", u4="52.2"),
    ),
    "sort": Table(
        "Sort quantization: bits, splits and a schedule",
        "MobileNetV2 on CIFAR-10, 80 epochs, cut after the first and before the last layer; RoBERTa-base on RTE, 20 "
        "epochs, first layer and last two",
        (Row("no compression", "none"),)
        + _accuracy(sort4="87.1", sort8="95.7", sort12="95.9", sort16="96.1")
        + (Row("half of the epochs 8 bits, then 12", "sort:bits=8,splits=2", {"accuracy, %": "95.7"},
               options=("--schedule", "HALF:sort:bits=12,splits=3")),
           Row("no compression", "none", task="rte"), SORT_4_2)
        + _glue("accuracy, %", "rte", sort8="79.7", sort12="79.7", sort16="79.7"),
        "Their decoder keeps the original values of one code at 4 and 12 bits, which flatters those rows.",
    ),
    "svd": Table(
        "Against SVD", "MobileNetV2 on CIFAR-10, 40 epochs",
        (Row("no compression", "none", task="cifar10, 40 epochs"),)
        + tuple(Row(f"SVD, rank {rank}, ratio {ratio}", f"lowrank:rank={ours},method=svd",
                    {"accuracy, %": accuracy_, "samples/s": rate}, "cifar10, 40 epochs")
                for rank, ratio, rate, accuracy_, ours in SVD)
        + (Row("power iteration, the bytes of ratio 0.25", "lowrank:rank=8", task="cifar10, 40 epochs"),
           Row("sort, 8 bits", "sort:bits=8,splits=2", {"accuracy, %": "95.73", "samples/s": "627.2"},
               "cifar10, 40 epochs")),
        "Their ratio leaves out one of the factors; our ranks (of 32 channels) have about the bytes that it promises.",
        throughput=(1, 1),
    ),
    "kmeans": Table(
        "Against k-means", "MobileNetV2 on CIFAR-10, 10 epochs, batch 64, first three and last two layers",
        tuple(Row(label, codec, {"accuracy, %": value, "samples/s": rate} if value else {}, _FIRST3)
              for label, codec, value, rate in (
                  ("no compression", "none", "94.21", "659.1"),
                  ("uniform, 4 bits", "uniform:bits=4", "89.42", "649.3"),
                  ("sort, 4 bits", "sort:bits=4,splits=1", "93.38", "641.4"),
                  ("k-means, 4 bits, 20 iterations", "kmeans:bits=4,iters=20", "93.01", "96.96"),
                  ("k-means, 4 bits, 50 iterations", "kmeans:bits=4,iters=50", "93.17", "48.12"),
                  ("k-means, 4 bits, 8 iterations a step", "kmeans:bits=4", None, None),
                  ("blocks, 4 bits", "block:bits=4", None, None),
              )),
        "Our k-means starts from the centroids of the step before, and is fitted to a sample of the tensor.",
        throughput=(3, 2),
    ),
    "scratch": Table(
        "From scratch against fine-tuning", "MobileNetV2 on CIFAR-10, 80 epochs, batch 256",
        tuple(Row(f"from scratch, {NAMES[key][0]}", NAMES[key][1], {"accuracy, %": value}, "cifar10 from scratch")
              for key, value in (("none", "94.07"), ("u16", "93.94"), ("k50", "94.02")))
        + tuple(Row(f"fine-tuned, {NAMES[key][0]}", NAMES[key][1], {"accuracy, %": value})
                for key, value in (("none", "96.1"), ("u16", "96.0"), ("k50", "96.1"))),
        "On the cpu budget the runs from scratch take 8 epochs at 64 pixels, those from weights 2 at 96.",
    ),
}  # fmt: skip
