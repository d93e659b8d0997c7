"""Images become normalised tensors: lazily with a transform, or from a decoded copy held in memory.

Both ways run the same two steps, `_fit` (a PIL image becomes a uint8 square) and `_finish` (augmentation and
normalisation of that square), so that they give the same tensors. Datasets made here yield `pixel_values` and
`labels`; the Trainer needs `remove_unused_columns=False` with them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hf_actcompress.workloads.data import TaskData

logger = logging.getLogger(__name__)

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
MAX_CACHE_BYTES = 2**30


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its images: `size` pixels squared, RGB in [0, 1] minus `mean` over `std`."""

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"


def image_transforms(
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
    train: bool = False,
    *,
    flip: bool = False,
    padding: int | None = None,
) -> Callable[[Any], torch.Tensor]:
    """A torchvision transform from a PIL image to a normalised float tensor [3, size, size].

    The shorter side is scaled to `size` and the centre is kept. With `train`, the square is padded with black by
    `padding` pixels (default an eighth of `size`) and cropped at random; `flip` adds a random mirror image.

    Raises:
        ValueError: for a size below 1, a negative padding or an unknown interpolation.
    """
    from torchvision.transforms import v2

    return v2.Compose([_fit(size, interpolation), _finish(size, mean, std, train, flip, padding)])


def _fit(size: int, interpolation: str) -> Any:
    from torchvision.transforms import v2

    if size < 1:
        raise ValueError(f"size={size}: an image needs 1 pixel or more.")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation={interpolation!r} is unknown; use one of {list(INTERPOLATIONS)}.")
    resize = v2.Resize(size, interpolation=v2.InterpolationMode(interpolation), antialias=True)
    return v2.Compose([v2.RGB(), resize, v2.CenterCrop(size), v2.PILToTensor()])


def _finish(
    size: int, mean: Sequence[float], std: Sequence[float], train: bool, flip: bool, padding: int | None
) -> Any:
    from torchvision.transforms import v2

    padding = size // 8 if padding is None else padding
    if padding < 0:
        raise ValueError(f"padding={padding}: give 0 or more pixels.")
    steps: list[Any] = []
    if train and padding:
        steps.append(v2.RandomCrop(size, padding=padding))
    if train and flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])


class _TransformRows:
    """The function of `with_transform`: a class, because worker processes must be able to pickle it."""

    def __init__(self, transform: Callable[[Any], torch.Tensor], image_column: str, label_column: str) -> None:
        self.transform, self.image_column, self.label_column = transform, image_column, label_column

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pixels = [self.transform(image) for image in rows[self.image_column]]
        return {"pixel_values": pixels, "labels": rows[self.label_column]}


def with_transform(
    dataset: Any, transform: Callable[[Any], torch.Tensor], image_column: str, label_column: str
) -> Any:
    """A view of a `datasets.Dataset` whose rows are `pixel_values` and `labels`, decoded at every access."""
    return dataset.with_transform(_TransformRows(transform, image_column, label_column))


def collate_images(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stacks rows into `pixel_values` [B, 3, H, W] and `labels` [B]."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([int(row["labels"]) for row in rows]),
    }


class CachedImages(torch.utils.data.Dataset):
    """Decoded images as one uint8 tensor; `finish` augments and normalises one at each access.

    Args:
        pixels: uint8 [N, 3, H, W].
        labels: the N classes.
        finish: uint8 [3, H, W] to float [3, size, size]; its randomness comes from torch's generator, which the
            Trainer seeds.
    """

    def __init__(self, pixels: torch.Tensor, labels: Sequence[int], finish: Callable[..., torch.Tensor]) -> None:
        if len(pixels) != len(labels):
            raise ValueError(f"{len(pixels)} images and {len(labels)} labels: the numbers must be equal.")
        self.pixels, self.labels, self.finish = pixels, list(labels), finish

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.finish(self.pixels[index]), "labels": self.labels[index]}


def prepare_images(
    data: TaskData,
    preprocessing: Preprocessing,
    *,
    cache: bool | None = None,
    max_bytes: int = MAX_CACHE_BYTES,
    padding: int | None = None,
) -> tuple[torch.utils.data.Dataset, torch.utils.data.Dataset]:
    """Training data with augmentation and evaluation data without, for the Trainer.

    Augmentation is a random crop, and a mirror image where `data.flip` says that it keeps the label.

    Args:
        cache: True decodes everything once into memory, False decodes at every access, None caches while both
            splits fit in `max_bytes`. Where they only fit at their own, smaller size (CIFAR-10 for a 96-pixel model)
            that size is cached and enlarged at every access.
        padding: of the random crop; None is an eighth of the size.
    """
    if data.image_column is None:
        raise ValueError(f"{data.task!r} is a text task and has no images; load it with load_images.")
    size = preprocessing.size
    cached_size = _cached_size(data, size, max_bytes) if cache is None else (size if cache else None)
    prepared = []
    for split, train in ((data.train, True), (data.eval, False)):
        fit = _fit(size, preprocessing.interpolation)
        finish = _finish(size, preprocessing.mean, preprocessing.std, train, data.flip, padding)
        pixels = None if cached_size is None else _decode(split, data, cached_size, size, preprocessing.interpolation)
        if pixels is None:
            from torchvision.transforms import v2

            prepared.append(with_transform(split, v2.Compose([fit, finish]), data.image_column, data.label_column))
        else:
            if cached_size != size:
                finish = _enlarge(size, preprocessing.interpolation, finish)
            prepared.append(CachedImages(pixels, split[data.label_column], finish))
    return prepared[0], prepared[1]


def _cached_size(data: TaskData, size: int, max_bytes: int) -> int | None:
    """The size at which both splits fit in memory: the model's, the images' own, or None."""
    rows = len(data.train) + len(data.eval)
    if 3 * rows * size**2 <= max_bytes:
        return size
    width, height = data.train[0][data.image_column].size
    if width == height < size and 3 * rows * width**2 <= max_bytes:
        return width
    logger.info(
        "%s: %d images of %d pixels exceed %d bytes; decoding at each access.", data.task, rows, size, max_bytes
    )
    return None


def _decode(split: Any, data: TaskData, cached_size: int, size: int, interpolation: str) -> torch.Tensor | None:
    """All images of a split as uint8 [N, 3, cached_size, cached_size]; None where one is not of its own size."""
    from tqdm.auto import tqdm

    fit = _fit(cached_size, interpolation)
    pixels = torch.empty(len(split), 3, cached_size, cached_size, dtype=torch.uint8)
    # disable=None: no bar where the output is not a terminal.
    rows = tqdm(split.select_columns(data.image_column), desc=f"decoding {data.task}", disable=None, leave=False)
    for index, row in enumerate(rows):
        image = row[data.image_column]
        if cached_size != size and image.size != (cached_size, cached_size):
            logger.info("%s: images differ in size; decoding at each access.", data.task)
            return None
        pixels[index] = fit(image)
    return pixels


def _enlarge(size: int, interpolation: str, finish: Any) -> Any:
    from torchvision.transforms import v2

    # Lanczos exists for PIL images only.
    name = "bicubic" if interpolation == "lanczos" else interpolation
    return v2.Compose([v2.Resize(size, interpolation=v2.InterpolationMode(name), antialias=True), finish])
