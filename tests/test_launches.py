"""Kernels that a GPU would be given, and nothing for which the host would wait for it: counted without a GPU."""

import pytest
import torch
from helpers.launches import Waits, backward, launches, no_values
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from transformers import BertConfig, BertForSequenceClassification

from hf_actcompress import ActCompressConfig, compress_model
from hf_actcompress.boundary.channel import Channel
from hf_actcompress.codecs import codec_names, parse_codec
from hf_actcompress.ops import gaussian, hadamard, trellis
from hf_actcompress.saved import tensors as saved_tensors

# Kernels of a first encode and of its decode.
CODECS = {
    "identity": (0, 1), "float8": (2, 1), "float8:format=e5m2": (2, 1), "uniform:bits=8": (3, 1),
    "uniform:bits=4,round=stochastic": (3, 1), "block:bits=4": (2, 1), "block:bits=2,round=stochastic": (2, 1),
    "block:bits=4,equalize=none": (1, 1), "rotated:bits=2": (2, 1), "rotated:bits=4": (2, 1), "kmeans:bits=4": (5, 2),
    "sort:bits=8": (5, 2), "topk:ratio=0.1": (8, 3), "topk:ratio=0.01": (8, 3),
    "lowrank:rank=8": (60, 4), "ef+block:bits=4": (8, 1), "ef+topk:ratio=0.1": (16, 3),
    "topk:ratio=0.1|uniform:bits=8": (11, 4), "sign": (24, 24),
}  # fmt: skip
WARM = {"lowrank:rank=8"}  # the first basis of a site comes from the host
PLAIN = {"trellis:bits=2"}  # these have no Triton form: thousands of kernels of torch
# Kernels more than the plain step has; in a step whose tensors are sampled for the log as well.
STEPS = {
    "identity boundaries": (ActCompressConfig("identity"), 8, 48),
    "block boundaries": (ActCompressConfig("block:bits=4"), 24, 64),
    "saved block": (ActCompressConfig(first=0, last=0, saved="block:bits=4"), 150, 160),
}


@pytest.mark.parametrize("spec", sorted(CODECS))
def test_a_codec(spec):
    codec, budget = parse_codec(spec), CODECS[spec]
    with no_values():
        x, nonfinite = torch.empty(32, 128, 384, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
        state = codec.init_state("here")
        if spec in WARM:
            codec.encode(x, state)
        with launches() as encoding:
            payload = codec.encode(x, state, nonfinite=nonfinite)
        with launches() as decoding:
            y = codec.decode(payload)
        with launches():
            codec.roundtrip(x, state, nonfinite=nonfinite)
    assert y.shape == x.shape and payload.nbytes == codec.payload_nbytes((32, 128, 384), torch.float32)
    encoding = [name for name in encoding if name != "count_nonfinite"]  # what sites ask for besides
    assert len(encoding) <= budget[0] and len(decoding) <= budget[1], (encoding, decoding)


@pytest.fixture
def constants():
    """Levels are found on the host, once; those of a device that is not there are forgotten again."""
    gaussian.distortions()
    trellis.tables(torch.device("cpu"))
    yield
    for kept in (gaussian.tables, trellis.tables, hadamard.signs):
        kept.cache_clear()


@pytest.mark.parametrize("spec", [
    "block:bits=4", "uniform:bits=4,round=stochastic", "rotated:bits=2", "trellis:bits=2", "sort:bits=8",
    "kmeans:bits=4", "topk:ratio=0.1", "float8", "lowrank:rank=8",
])  # fmt: skip
def test_a_codec_in_plain_torch_waits_for_nothing(spec, constants):
    codec = parse_codec(spec)
    with no_values():
        x, nonfinite = torch.empty(2, 30, 64, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
        state = codec.init_state("here")
        with launches(plain=True, first=True):
            codec.decode(codec.encode(x, state))
        with launches(plain=True):
            assert codec.decode(codec.encode(x, state, nonfinite=nonfinite)).shape == x.shape


def test_every_codec_has_a_budget():
    specs = {*CODECS, *PLAIN}
    assert {name for name in codec_names()} == {spec.partition(":")[0].partition("+")[0] for spec in specs} - {"ef"}


def step(config=None):
    """Kernels of a first training step, and of a second one."""
    with no_values(), torch.device("cuda"):
        model = BertForSequenceClassification(BertConfig(
            vocab_size=1000, hidden_size=384, num_hidden_layers=2, num_attention_heads=12, intermediate_size=1536,
            num_labels=2,
        )).train()  # fmt: skip
        ids = torch.zeros(32, 128, dtype=torch.int64)
        batch = {"input_ids": ids, "attention_mask": ids + 1, "labels": ids[:, 0].clone()}
        handle, found = None if config is None else compress_model(model, config), []
        for _ in range(2):
            model.zero_grad()
            with launches() as names:
                backward(model(**batch).loss)
            found.append(names)
    return found, handle


@pytest.fixture(scope="module")
def plain():
    return step()[0]


@pytest.mark.parametrize("name", STEPS)
def test_a_training_step(name, plain, monkeypatch):
    monkeypatch.setattr(saved_tensors, "Tensor", FakeTensor)  # other subclasses are left alone
    config, budget, sampled = STEPS[name]
    found, handle = step(config)
    assert len(handle.boundaries) == (0 if config.saved else 2)
    first, second = (len(names) - len(exact) for names, exact in zip(found, plain, strict=True))
    assert 8 <= second <= budget and second <= first <= sampled
    assert all(meter.calls == 2 for meter in handle.meters.values())


def test_what_is_counted_and_refused():
    with no_values(), launches() as names:
        x = torch.empty(4, 6, device="cuda")
        y = x.view(6, 4).t()[1:].detach()
        assert names == []
        y.add_(1)
        (y + torch.zeros((), device="cuda")).contiguous()
        assert names == ["add_", "zeros", "add", "clone"]
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
        with pytest.raises(DataDependentOutputException):
            bool((x > 0).any())
        for values in ([1.0, 2.0], 3.0):
            with pytest.raises(Waits):
                torch.tensor(values, device="cuda")
        for copy in (x.cpu, lambda: torch.ones(3).cuda(), lambda: x.copy_(torch.ones(6))):
            with pytest.raises(Waits):
                copy()


def test_backward_is_that_of_the_engine():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU(), torch.nn.LayerNorm(4))
    x = torch.randn(3, 4)

    def loss():
        y = model(x) + model[0].bias
        return (y * y.exp()).sum() + model[0].weight.sum()

    loss().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    backward(loss())
    for p, exact in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, exact)


def test_a_recomputed_pass_waits_only_where_several_calls_could_be_meant():
    channel = Channel("here", "forward", parse_codec("block:bits=2,round=stochastic"))
    with no_values():
        x, other = (torch.empty(64, size, device="cuda") for size in (64, 32))
        for _ in range(3):  # of each shape one call is open
            channel(x)
            channel(other)
            channel.replay(x)
            channel.replay(other)
        channel(x)
        channel(x)
        with pytest.raises(DataDependentOutputException):
            channel.replay(x)


def test_what_is_counted_on_a_device_raises_when_the_next_pass_begins():
    config = ActCompressConfig("block:bits=4", saved="block:bits=4", nonfinite="raise", blocks=list("0123"))
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
    with compress_model(model, config) as handle:
        found = [channel.found for name in handle.boundaries for _, channel in handle.channels(name)]
        assert len(found) == 4 and all(one.raises for one in (*found, handle.saved.found))
        model(torch.randn(2, 8)).sum().backward()
        for one in found:
            one.on(torch.device("cpu")).add_(1)
        with pytest.raises(FloatingPointError, match=f"{found[0].name}: NaN, Inf.*the last step.*'pass'"):
            handle.model(torch.randn(2, 8))
        handle.model(torch.randn(2, 8))  # said once
        handle.saved.found.on(torch.device("cpu")).add_(1)
        with pytest.raises(FloatingPointError, match="saved: NaN"):
            handle.model(torch.randn(2, 8))
        found[-1].on(torch.device("cpu")).add_(1)
        with pytest.raises(FloatingPointError, match=found[-1].name):
            handle.check_finite()
