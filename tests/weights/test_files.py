"""Configurations of folders from elsewhere: nothing beyond the folder is read."""

import json

import pytest

from hf_actcompress.weights.files import build_model, read_config


@pytest.mark.parametrize("change", [
    {"model_args": {"checkpoint_path": "other.pth"}}, {"model_args": {"pretrained_cfg_overlay": {"file": "x"}}},
    {"architecture": "hf-hub:somebody/something"},
])  # fmt: skip
def test_a_configuration_that_reads_another_file_is_refused(tmp_path, change):
    pytest.importorskip("timm")
    config = {"model_type": "timm_wrapper", "architecture": "resnet18", "num_classes": 10}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path).architecture == "resnet18"
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match="files beyond the folder"):
        build_model(tmp_path)


@pytest.mark.parametrize("name", ["pipeline", "AutoTokenizer", "none"])
def test_only_models_are_built(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": [name]}))
    with pytest.raises(ValueError, match=f"names the class '{name}', which is no model"):
        build_model(tmp_path)


def test_code_beside_the_configuration_is_not_run(tmp_path):
    mark = tmp_path / "executed"
    (tmp_path / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Config: ...\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}))
    with pytest.raises(ValueError):
        read_config(tmp_path)
    assert not mark.exists()
