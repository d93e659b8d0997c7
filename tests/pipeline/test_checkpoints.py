"""What ranks write is whole, or passed over; what cannot be written is said before training."""

import errno
import json
import shutil

import pytest
import torch

from hf_actcompress.codecs.states import save_states
from hf_actcompress.pipeline import checkpoints
from hf_actcompress.pipeline.checkpoints import check_folder, flaw, write_manifest


@pytest.fixture
def alone(monkeypatch):
    """One rank, without a process group."""
    monkeypatch.setattr(checkpoints.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(checkpoints.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(checkpoints.dist, "barrier", lambda: None)
    monkeypatch.setattr(checkpoints, "share", lambda value, source: value)


STATE = {"weights": {"a": torch.arange(1000.0)}, "step": 3, "text": "x" * 50}


def test_any_flipped_byte_is_found(tmp_path):
    path, generator = tmp_path / "rank0.safetensors", torch.Generator().manual_seed(0)
    save_states(path, STATE)
    write_manifest(path, 3)
    files = [path, path.with_suffix(".manifest")]
    whole = [file.read_bytes() for file in files]
    assert flaw(path, 3) is None
    for trial in range(200):
        which = trial % 2
        data = bytearray(whole[which])
        data[int(torch.randint(len(data), (1,), generator=generator))] ^= 1 << trial // 2 % 8
        files[which].write_bytes(data)
        assert "damaged" in flaw(path, 3)
        files[which].write_bytes(whole[which])
    assert flaw(path, 3) is None
    for length in (0, 1, len(whole[0]) - 1):
        path.write_bytes(whole[0][:length])
        assert f"has {length} bytes, of {len(whole[0])}" in flaw(path, 3)
    path.unlink()
    assert flaw(path, 3) == "is not complete: no rank0.safetensors"
    path.write_bytes(whole[0])
    assert "is that of step 3" in flaw(path, 4)


def test_the_newest_whole_step_is_used_and_others_left_alone(tmp_path, alone, caplog):
    for step in (4, 8, 12):
        checkpoints.save(tmp_path, step, {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-12", "step-8"]
    for name in ("step-07", "step-x", "step-", "step-٣", "step--1", "step-12 (copy)"):
        shutil.copytree(tmp_path / "step-8", tmp_path / name)
    assert checkpoints.load(tmp_path)[0] == {"step": 12}
    (tmp_path / "step-12/rank0.manifest").unlink()  # killed between the two files
    assert checkpoints.load(tmp_path)[0] == {"step": 8}
    assert "from step 8, and not from step 12: step 12 of rank 0 is not complete: no rank0.manifest" in caplog.text
    (tmp_path / "step-8/rank0.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="no step of which all ranks have a whole check.*step 8 of rank 0 is dam"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("name", ["a file/x", "x" * 300, "nul\0byte", "half \ud800"])
def test_folders_that_cannot_be_written_are_named_before_training(tmp_path, name):
    (tmp_path / "a file").write_text("")
    with pytest.raises(ValueError, match=r"Rank 0 cannot write to '.*Give another --output_dir"):
        check_folder(tmp_path / name, 10)


@pytest.mark.parametrize("name", ["with space", "[1]*?", "ümläut 名", "-x", "a/b/c"])
def test_odd_names_are_no_trouble(tmp_path, alone, name):
    check_folder(tmp_path / name, 10)
    assert list((tmp_path / name).iterdir()) == []
    checkpoints.save(tmp_path / name, 2, {"a": torch.ones(2)})
    assert torch.equal(checkpoints.load(tmp_path / name)[0]["a"], torch.ones(2))


def test_a_full_disk_is_foreseen_and_loses_nothing(tmp_path, alone, monkeypatch):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(ValueError, match=r"3 checkpoints of .* GB need .*Free some"):
        check_folder(tmp_path, free // 2)
    checkpoints.save(tmp_path, 4, {"step": 4})

    def full(path, values):
        path.with_name(f"{path.name}.tmp").write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_states", full)
    with pytest.raises(ValueError, match="could not write the checkpoint of step 8.*No space left.*--resume"):
        checkpoints.save(tmp_path, 8, {"step": 8})
    assert [path.name for path in (tmp_path / "step-8").iterdir()] == []
    assert checkpoints.load(tmp_path)[0] == {"step": 4}


def test_manifests_are_json(tmp_path):
    path = tmp_path / "rank1.safetensors"
    save_states(path, STATE)
    write_manifest(path, 7)
    said = json.loads(path.with_suffix(".manifest").read_text().splitlines()[0])
    assert said["step"] == 7 and said["files"]["rank1.safetensors"]["bytes"] == path.stat().st_size
