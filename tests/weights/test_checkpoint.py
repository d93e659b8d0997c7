"""Compressed files: bit-identical weights, as many bytes as were counted, and nothing half-loaded."""

import copy
import dataclasses
import pickle

import pytest
import torch
from helpers.files import Touch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_actcompress.codecs import Codec, Payload
from hf_actcompress.weights import (
    LearningCompression,
    checkpoint,
    count_bits,
    load_compressed,
    read_manifest,
    save_compressed,
)
from hf_actcompress.weights.checkpoint import FILE_NAME
from hf_actcompress.weights.restore import restore
from hf_actcompress.weights.stream import Reader, Writer
from hf_actcompress.workloads.lenet import LeNet5

SCHEMES = {
    "codebook": "codebook:k=2",
    "front": {"conv1": "codebook:k=4", "conv2": "prune:keep=800,k=8", "fc*": "prune:keep=6000,k=4"},
    "mix": {"conv*": "prune:keep=2505", "fc*": "lowrank:rank=5"},
    "sum": {"conv*": "ternary", "fc1": "codebook:k=2 + prune:keep=1%", "fc2": "lowrank:rank=2 + prune:keep=50"},
    "codecs": {"fc*": "block:bits=4,group=128", "conv2": "topk:ratio=0.1|uniform:bits=8", "conv1": "float8"},
}


class Mixed(nn.Module):
    """Other dtypes, buffers, an empty tensor, a 0-d tensor, shared weights."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.low, self.norm = nn.Linear(4, 4).bfloat16(), nn.BatchNorm1d(4)
        self.scale, self.empty = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.zeros(0, 3))


@pytest.fixture(scope="module")
def lenet():
    torch.manual_seed(0)
    return LeNet5()


def fresh(kind=LeNet5):
    torch.manual_seed(1)
    return kind()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_file_takes_the_counted_bytes_and_gives_the_same_bits(tmp_path, lenet, scheme):
    net = copy.deepcopy(lenet)
    lc = LearningCompression(net, SCHEMES[scheme])
    lc.finish()
    path = lc.save(tmp_path)
    assert abs(8 * path.stat().st_size / lc.bits - 1) < 0.02, (scheme, path.stat().st_size, lc.bits / 8)
    other = fresh()
    load_compressed(tmp_path, other)
    for name, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_direct_compression_leaves_the_model_as_it_is(tmp_path, lenet):
    before = copy.deepcopy(lenet.state_dict())
    save_compressed(lenet, tmp_path, "codebook:k=4")
    assert all(torch.equal(v, before[k]) for k, v in lenet.state_dict().items())
    assert len(load_compressed(tmp_path)["fc1.weight"].unique()) == 4


def test_other_dtypes_shared_weights_and_buffers(tmp_path):
    net = fresh(Mixed)
    net.norm(torch.randn(9, 4))
    lc = LearningCompression(net, {"embed": "codebook:k=3", "low": "binary"})
    lc.finish()
    lc.save(tmp_path)
    assert lc.bits == count_bits(net) - 32 * 28 - 16 * 16 + (2 * 28 + 96) + (16 + 32)
    other = Mixed()
    load_compressed(tmp_path, other)
    for name, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], value) and other.state_dict()[name].dtype == value.dtype, name
    assert other.head.weight is other.embed.weight


def test_structure_and_description(tmp_path, lenet):
    save_compressed(lenet, tmp_path, {"conv1": "lowrank:rank=3"}, structure={"fc1": [400, 500]})
    found = read_manifest(tmp_path)
    assert found["structure"] == {"fc1": [400, 500]}
    assert found["compressed"] == [{"names": ["conv1.weight"], "stored": ["lowrank", 3]}]
    assert found["tensors"]["fc1.bias"] == ((500,), torch.float32)


# Nothing is half-loaded


def refused(folder, net, message):
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message):
        load_compressed(folder, net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.fixture
def saved(tmp_path, lenet):
    save_compressed(lenet, tmp_path, SCHEMES["mix"])
    return tmp_path


def test_a_missing_file(tmp_path):
    refused(tmp_path, fresh(), "There is no compressed model at")


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_file(saved, share):
    content = (saved / FILE_NAME).read_bytes()
    (saved / FILE_NAME).write_bytes(content[: int(share * len(content))])
    refused(saved, fresh(), "damaged or cut short")


def test_every_kind_of_flipped_bit(saved):
    content = (saved / FILE_NAME).read_bytes()
    for at in [*range(0, 200, 7), *range(200, len(content), len(content) // 60), len(content) - 1]:
        broken = bytearray(content)
        broken[at] ^= 16
        (saved / FILE_NAME).write_bytes(broken)
        try:
            state = load_compressed(saved)
        except ValueError:
            continue
        # A flip in a name of the header's padding may do nothing at all; a change of values may not pass.
        (saved / FILE_NAME).write_bytes(content)
        assert all(torch.equal(v, state[k]) for k, v in load_compressed(saved).items()), at


def test_another_model(saved):
    net = fresh()
    net.fc2 = nn.Linear(500, 11)
    both = r"fc2.bias is \(10,\) float32 in the file and \(11,\) float32 in the model"
    refused(saved, net, f"does not fit the model: {both}.*Nothing was loaded")
    refused(saved, fresh().double(), "float64 in the model")
    net = fresh()
    net.extra = nn.Linear(2, 2)
    refused(saved, net, "extra.bias is only in the model")
    refused(saved, nn.Sequential(), "conv1.bias is only in the file")


def changed(folder, change):
    """The file with another manifest, sealed as if it were right."""
    path = folder / FILE_NAME
    data, about = checkpoint._open(load_file(path)[checkpoint.TENSOR])
    change(about)
    save_file({checkpoint.TENSOR: checkpoint._seal(data, about)}, path)


HUGE = 10**15


@pytest.mark.parametrize(("change", "message"), [
    (lambda about: about["c"][0][0].pop(), "number of float32 values|sparse"),
    (lambda about: about["c"][0][0].__setitem__(0, -1), "index of a tensor=-1"),
    (lambda about: about["c"][0][0].__setitem__(0, 2), "conv2.weight: compressed twice"),
    (lambda about: about["c"][0].__setitem__(1, ["sparse", 60, 5]), "sparse: width=60"),
    (lambda about: about["c"][0].__setitem__(1, ["sparse", 0, HUGE]), f"sparse: fields={HUGE}"),
    (lambda about: about["c"][0].__setitem__(1, ["sparse", 7, -3]), "sparse: fields=-3"),
    (lambda about: about["c"][0][1].append(HUGE), f"sparse: k={HUGE}"),
    (lambda about: about["c"][0].__setitem__(1, ["codebook", -1]), "codebook: k=-1"),
    (lambda about: about["c"][1].__setitem__(1, ["lowrank", HUGE]), "lowrank"),
    (lambda about: about["c"][0].__setitem__(1, ["nonsense"]), "unknown kind"),
    (lambda about: about["c"][0].__setitem__(1, {}), "describes no compression"),
    (lambda about: about["c"][1][1].pop(), "each"),
    (lambda about: about["d"].update(float32=3), "uint8 values|float32 values|bytes of data"),
    (lambda about: about["d"].update(float32=-1), "float32 values=-1"),
    (lambda about: about["d"].update(float32=HUGE), f"float32 values={HUGE}"),
    (lambda about: about["d"].update(nonsense=3), "dtype 'nonsense' is unknown"),
    (lambda about: about["d"].update(load=3), "dtype 'load' is unknown"),
    (lambda about: about.update(t=None), "NoneType"),
    (lambda about: about["t"].update({"fc1.bias": [-500]}), "fc1.bias: .* is no shape"),
    (lambda about: about["t"].update({"fc1.bias": [HUGE]}), "fc1.bias has the shape .*this machine has"),
    (lambda about: about["t"].update({"fc1.bias": [True]}), "is no shape"),
])  # fmt: skip
def test_a_manifest_that_does_not_fit_its_data(saved, change, message):
    changed(saved, change)
    with pytest.raises(ValueError, match=f"{FILE_NAME} is damaged: its manifest does not fit its data .*({message})"):
        load_compressed(saved)
    net = fresh()
    refused(saved, net, "is damaged: its manifest|does not fit the model")


def test_a_code_beyond_the_codebook():
    out = Writer()
    out.codes([0, 3, 1], 2)
    out.put(torch.zeros(3))
    with pytest.raises(ValueError, match="codebook: code: the file holds 3, and there are 3"):
        restore(["codebook", 3], [(3,)], Reader(out.joined()))


def test_a_manifest_that_unpacks_to_too_much(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "LARGEST_MANIFEST", 100)
    with pytest.raises(ValueError, match="manifest is longer than 100 bytes"):
        load_compressed(saved)


def test_a_pickle_is_not_executed(saved, tmp_path):
    mark = tmp_path / "executed"
    (saved / FILE_NAME).write_bytes(pickle.dumps(Touch(mark)))
    refused(saved, fresh(), "no compressed model, or is damaged")
    assert not mark.exists()


def test_another_safetensors_file(saved):
    save_file({"weight": torch.zeros(3)}, saved / FILE_NAME)
    refused(saved, fresh(), r"no compressed model.*holds \['weight'\]")


@pytest.mark.parametrize(("change", "message"), [
    (lambda stored: stored["tensors"]["codes"].__setitem__(1, 1), "codec: the payload holds .* block:bits=4 makes"),
    (lambda stored: stored["tensors"]["codes"].__setitem__(1, HUGE), f"codec: codes={HUGE}"),
    (lambda stored: stored["tensors"]["codes"].__setitem__(1, -1), "codec: codes=-1"),
    (lambda stored: stored.update(shape=[500, 8000]), "codec: the payload's shape"),
    (lambda stored: stored.update(codec="block:bits=2"), "codec: the payload holds"),
    (lambda stored: stored.update(codec="nobody"), "Unknown codec 'nobody'"),
    (lambda stored: stored.update(dtype="load"), "dtype 'load' is unknown"),
    (lambda stored: stored.pop("parts"), "not complete"),
])  # fmt: skip
def test_a_payload_that_its_codec_would_not_make(tmp_path, lenet, change, message):
    save_compressed(lenet, tmp_path, {"fc1": "block:bits=4"})
    changed(tmp_path, lambda about: change(about["c"][0][1][1]))
    with pytest.raises(ValueError, match=f"damaged.*fc1.weight: .*{message}"):
        load_compressed(tmp_path)


def test_payloads_of_version_01(tmp_path):
    """They say whether they are raw: then the tensor itself is there, whatever the codec."""
    net = nn.Linear(40, 40)
    for spec, raw in (("block:bits=4", False), ("identity", True)):
        save_compressed(net, tmp_path, spec)
        expected = load_compressed(tmp_path)["weight"]

        def as_before(about, raw=raw):
            payload = about["c"][0][1][1]
            payload["raw"] = raw
            if raw:
                payload.update(codec="block:bits=4", tensors={"raw": payload["tensors"].pop("values")})

        changed(tmp_path, as_before)
        assert torch.equal(load_compressed(tmp_path)["weight"], expected)
    assert torch.equal(expected, net.weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_their_name(tmp_path, lenet, bad):
    net = copy.deepcopy(lenet)
    net.fc1.weight.data[0, 0] = bad
    with pytest.raises(ValueError, match="hold NaN or Inf: fc1.weight"):
        save_compressed(net, tmp_path, {"fc*": "block:bits=4"})


def test_a_codec_from_outside(tmp_path, lenet, monkeypatch):
    """Registered, a codec works by its spec; where it is not, the file is refused with its name."""
    from hf_actcompress.codecs import registry

    monkeypatch.setattr(registry, "CODECS", dict(registry.CODECS))

    @registry.register_codec("signs")
    @dataclasses.dataclass(frozen=True)
    class Signs(Codec):
        size: float = 0.5

        def _encode(self, x, state):
            return Payload(str(self), tuple(x.shape), x.dtype, {"signs": (x >= 0).to(torch.uint8)})

        def _decode(self, payload):
            return (payload.tensors["signs"].to(payload.dtype) * 2 - 1) * self.size

        def _payload_nbytes(self, shape, dtype):
            return torch.Size(shape).numel()

    save_compressed(lenet, tmp_path, {"fc1": "signs:size=0.25"})
    found = load_compressed(tmp_path)["fc1.weight"]
    assert torch.equal(found, torch.where(lenet.fc1.weight >= 0, 0.25, -0.25))
    del registry.CODECS["signs"]
    with pytest.raises(ValueError, match="fc1.weight: Unknown codec 'signs'"):
        load_compressed(tmp_path)
