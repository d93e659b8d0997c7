"""Transforms, the cached data set and the collator: lazy and cached agree, and digits are never mirrored."""

import pickle

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_actcompress.workloads import Preprocessing, TaskData, collate_images, image_transforms, images, prepare_images

pytest.importorskip("torchvision")

WANTS = Preprocessing(16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic")


def make_image(seed=0, size=(16, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def task(flip=False, sizes=((16, 16),) * 12):
    rows = {"img": [make_image(i, size) for i, size in enumerate(sizes)], "label": [i % 3 for i in range(len(sizes))]}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
    split = datasets.Dataset.from_dict(rows, features=features)
    return TaskData(split, split, "things", "label", ("0", "1", "2"), image_column="img", flip=flip)


def by_hand(image, wants=WANTS):
    scaled = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy((scaled - np.float32(wants.mean)) / np.float32(wants.std)).permute(2, 0, 1)


def close(a, b):
    return torch.allclose(a, b, atol=1e-5)


def test_evaluation_is_only_normalised():
    transform = image_transforms(16, WANTS.mean, WANTS.std, flip=True)
    for _ in range(5):
        torch.testing.assert_close(transform(make_image()), by_hand(make_image()))


def test_training_crops_and_flips_only_where_asked():
    image, plain = make_image(), by_hand(make_image())
    crop = image_transforms(16, WANTS.mean, WANTS.std, train=True)
    assert any(not close(crop(image), plain) for _ in range(10))
    still = image_transforms(16, WANTS.mean, WANTS.std, train=True, padding=0)
    assert all(close(still(image), plain) for _ in range(10))
    mirror = image_transforms(16, WANTS.mean, WANTS.std, train=True, padding=0, flip=True)
    seen = [close(mirror(image), plain.flip(-1)) for _ in range(30)]
    assert any(seen) and not all(seen)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
@pytest.mark.parametrize("size", [(8, 8), (30, 20)])
def test_any_image_becomes_a_square_of_three_channels(mode, size):
    assert image_transforms(16, WANTS.mean, WANTS.std)(make_image(0, size).convert(mode)).shape == (3, 16, 16)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"size": 0}, "size=0"),
        ({"interpolation": "cubic"}, "'cubic' is unknown.*bicubic"),
        ({"padding": -1}, "padding=-1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        image_transforms(**{"size": 8, "mean": WANTS.mean, "std": WANTS.std, **arguments})


@pytest.mark.parametrize("size", [8, 16, 24])
def test_cached_and_lazy_give_the_same_tensors(size):
    wants = Preprocessing(size, WANTS.mean, WANTS.std)
    for split in (0, 1):
        cached, lazy = (prepare_images(task(True), wants, cache=cache)[split] for cache in (True, False))
        assert isinstance(cached, images.CachedImages) and len(cached) == len(lazy) == 12
        for i in range(12):
            torch.manual_seed(i)
            a = cached[i]
            torch.manual_seed(i)
            b = lazy[i]
            assert torch.equal(a["pixel_values"], b["pixel_values"]) and a["labels"] == b["labels"] == i % 3


@pytest.mark.parametrize("cache", [True, False])
def test_digits_are_never_mirrored(cache):
    data = task(flip=False)
    train, evaluation = prepare_images(data, WANTS, cache=cache, padding=0)
    for i in range(12):
        assert torch.equal(train[i]["pixel_values"], evaluation[i]["pixel_values"])
    flipped, _ = prepare_images(task(flip=True), WANTS, cache=cache, padding=0)
    assert any(not torch.equal(flipped[i]["pixel_values"], evaluation[i]["pixel_values"]) for i in range(12))


def test_small_images_are_cached_at_their_own_size_where_the_large_ones_do_not_fit():
    wants = Preprocessing(48, WANTS.mean, WANTS.std)
    room = 3 * 24 * 16 * 16
    _, native = prepare_images(task(), wants, max_bytes=room)
    _, full = prepare_images(task(), wants)
    assert native.pixels.shape[-1] == 16 and full.pixels.shape[-1] == 48
    difference = (native[0]["pixel_values"] - full[0]["pixel_values"]).abs() * torch.tensor(WANTS.std).view(3, 1, 1)
    assert difference.max() * 255 <= 2.01
    _, lazy = prepare_images(task(), wants, max_bytes=room - 1)
    assert isinstance(lazy, datasets.Dataset)
    mixed = task(sizes=((16, 16),) * 11 + ((10, 10),))
    assert isinstance(prepare_images(mixed, wants, max_bytes=room)[0], datasets.Dataset)


def test_prepared_data_can_be_pickled_for_workers():
    for cache in (True, False):
        train, _ = prepare_images(task(True), WANTS, cache=cache)
        assert pickle.loads(pickle.dumps(train))[0]["pixel_values"].shape == (3, 16, 16)


def test_collate_stacks():
    batch = collate_images([{"pixel_values": torch.ones(3, 2, 2), "labels": label} for label in (1, np.int64(2))])
    assert batch["pixel_values"].shape == (2, 3, 2, 2) and batch["labels"].tolist() == [1, 2]
    assert batch["labels"].dtype == torch.int64


def test_text_has_no_images():
    data = TaskData([], [], "rte", "label", ("a", "b"), text_columns=("sentence",))
    with pytest.raises(ValueError, match="'rte' is a text task.*load_images"):
        prepare_images(data, WANTS)
    with pytest.raises(ValueError, match="2 images and 1 labels"):
        images.CachedImages(torch.zeros(2, 3, 1, 1, dtype=torch.uint8), [0], lambda x: x)
