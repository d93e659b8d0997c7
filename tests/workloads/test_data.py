"""Loading by name, folder and hub id: what is detected, and what is said when it fails."""

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_actcompress.workloads import embedded, hub, load_images, load_text


@pytest.fixture
def parquet_folder(tmp_path):
    def write(columns, rows=20, name="task", splits=("train", "validation"), features=None):
        folder = tmp_path / name
        folder.mkdir()
        for split in splits:
            values = {column: [make(i) for i in range(rows)] for column, make in columns.items()}
            datasets.Dataset.from_dict(values, features=features).to_parquet(str(folder / f"{split}.parquet"))
        return str(folder)

    return write


TEXT = {"sentence": lambda i: f"sentence {i}", "label": lambda i: i % 2}


@pytest.mark.parametrize(
    "name, columns, labels",
    [
        ("tiny/rte", ("sentence1", "sentence2"), ("entailment", "not_entailment")),
        ("tiny/cola", ("sentence",), ("unacceptable", "acceptable")),
    ],
)
def test_text_folder(shared, name, columns, labels):
    data = load_text(shared(name))
    assert (data.task, data.text_columns, data.label_names) == (name.split("/")[1], columns, labels)
    assert (len(data.train), len(data.eval), data.num_labels) == (256, 128, 2)
    assert "train/validation" in data.source


def test_task_names_a_sub_folder(shared):
    assert load_text(shared("glue"), "rte", max_train=8).task == "rte"
    with pytest.raises(ValueError, match=r"several tasks, \['cola', 'rte', 'sst2'\].*task="):
        load_text(shared("glue"))
    with pytest.raises(ValueError, match="no folder 'mrpc'.*cola"):
        load_text(shared("glue"), "mrpc")


@pytest.mark.parametrize("name, column, flip", [("tiny/cifar10", "img", True), ("tiny/mnist", "image", False)])
def test_image_folder(shared, name, column, flip):
    data = load_images(shared(name))
    assert (data.image_column, data.flip, data.num_labels, len(data.eval)) == (column, flip, 10, 128)


def test_embedded_images_are_not_flipped():
    pytest.importorskip("sklearn")
    data = load_images("embedded", max_train=10, max_eval=5)
    assert (data.task, data.flip, data.num_labels, len(data.train), len(data.eval)) == ("digits", False, 10, 10, 5)


def test_embedded_text(monkeypatch, docstring_task):
    monkeypatch.setattr(embedded, "docstrings", lambda: docstring_task)
    data = load_text(max_train=4)
    assert (data.task, data.text_columns, len(list(data.texts()))) == ("docstrings", ("sentence",), 4)
    with pytest.raises(ValueError, match="'docstrings', got task='cola'"):
        load_text("embedded", "cola")


def test_folder_of_images(tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / "pets" / kind).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / "pets" / kind / f"{i}.png")
    data = load_images(str(tmp_path / "pets"))
    assert (data.label_names, data.image_column, data.flip) == (("cat", "dog"), "image", True)
    assert (len(data.train), len(data.eval)) == (18, 2) and "held out" in data.source
    assert sorted(data.eval["label"]) == [0, 1]


def test_subsampling_is_a_seeded_shuffle(parquet_folder):
    folder = parquet_folder(TEXT)
    first, same, other = (load_text(folder, max_train=6, seed=seed).train["sentence"] for seed in (0, 0, 1))
    assert list(first) == list(same) != list(other)
    assert list(first) != [f"sentence {i}" for i in range(6)]
    assert len(load_text(folder, max_train=10**6).train) == 20
    with pytest.raises(ValueError, match="max_eval=0.*all 20"):
        load_text(folder, max_eval=0)


def test_plain_labels_become_the_same_classes_in_both_splits(tmp_path):
    for split, labels in (("train", [10, 2, 2, 10]), ("test", [10, 7, 10, 7])):
        rows = {"text": list("abcd"), "label": labels}
        datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / f"{split}.parquet"))
    data = load_text(str(tmp_path))
    assert data.label_names == ("2", "7", "10")
    assert list(data.train["label"]) == [2, 0, 0, 2] and list(data.eval["label"]) == [2, 1, 2, 1]


def test_real_labels_are_a_regression(parquet_folder):
    folder = parquet_folder({"sentence1": str, "sentence2": str, "label": lambda i: i / 4}, name="stsb")
    data = load_text(folder)
    assert data.is_regression and data.num_labels == 1 and data.label_names == ()


def test_pairs_are_found_before_single_columns(parquet_folder):
    columns = {"question": str, "sentence": str, "label": lambda i: i % 2}
    assert load_text(parquet_folder(columns)).text_columns == ("question", "sentence")


def test_columns_can_be_named(parquet_folder):
    folder = parquet_folder({"a": str, "b": str, "c": str, "answer": lambda i: i % 3})
    data = load_text(folder, text_columns=["c", "a"], label_column="answer")
    assert (data.text_columns, data.label_column, data.num_labels) == (("c", "a"), "answer", 3)
    for arguments, message in [
        ({}, r"No label column among \['a', 'b', 'c', 'answer'\].*label_column="),
        ({"label_column": "x"}, r"label_column names unknown columns \['x'\].*'answer'"),
        ({"label_column": "answer"}, "3 text columns.*text_columns="),
        ({"label_column": "answer", "text_columns": ["z"]}, r"text_columns names unknown columns \['z'\]"),
        ({"label_column": "answer", "text_columns": []}, "one text or a pair"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_text(folder, **arguments)
    with pytest.raises(ValueError, match="0 image columns.*load_text"):
        load_images(folder, label_column="answer")


def test_a_train_split_is_needed(parquet_folder):
    with pytest.raises(ValueError, match=r"splits \['test'\].*'train' is needed"):
        load_text(parquet_folder(TEXT, splits=("test",)))


def test_an_unreadable_folder_says_what_it_holds(tmp_path):
    (tmp_path / "notes.xyz").write_text("nothing")
    with pytest.raises(ValueError, match=r"notes.xyz.*parquet"):
        load_text(str(tmp_path))


def test_a_missing_path_says_where_it_looked(tmp_path):
    missing = str(tmp_path / "nowhere")
    for load in (load_text, load_images):
        with pytest.raises(ValueError, match=f"looked for {missing}.*cannot be a hub id.*--dataset embedded"):
            load(missing)


def test_a_hub_id_offline_says_what_works(monkeypatch):
    with pytest.raises(ValueError, match="switched off by HF_HUB_OFFLINE.*--dataset embedded"):
        load_text("nyu-mll/glue", "rte")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_resolves", lambda endpoint: False)
    with pytest.raises(ValueError, match="no local|not a local folder.*no network.*--dataset embedded"):
        load_images("uoft-cs/cifar10")
    assert constants.HF_HUB_OFFLINE is False


def test_hub_state(monkeypatch):
    from huggingface_hub import constants

    assert hub.hub_state() == "offline mode"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_resolves", lambda endpoint: True)
    assert hub.hub_state() == "online"


def test_a_proxy_counts_as_a_network(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    hub._resolves.cache_clear()
    assert not hub._resolves("https://no-such-host.invalid")
    hub._resolves.cache_clear()
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    assert hub._resolves("https://no-such-host.invalid")
    hub._resolves.cache_clear()
