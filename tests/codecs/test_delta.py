"""Delta: both sides keep the same bounded cache, and what arrives is what a plain loop over samples makes."""

import pytest
import torch
from torch import nn

from hf_actcompress.boundary.hook import Boundary
from hf_actcompress.codecs import Block, parse_codec, sample_ids
from hf_actcompress.pipeline.wire import WireFormat

SHAPE = (3, 50)  # of a sample: 150 values, a group of 128 and a part of one


def activations(ids, epoch, shape=SHAPE):
    """Of a network that changes a little from epoch to epoch."""
    rows = []
    for number in ids:
        base = torch.randn(shape, generator=torch.Generator().manual_seed(number + 100))
        rows.append(base + 0.02 * epoch * torch.randn(shape, generator=torch.Generator().manual_seed(epoch)))
    return torch.stack(rows)


class Twin:
    """AQ-SGD with a dict and loops."""

    def __init__(self, codec):
        self.codec, self.cache = codec, {}

    def __call__(self, x, ids):
        y = torch.empty_like(x)
        new = [k for k, i in enumerate(ids) if i not in self.cache]
        seen = [k for k, i in enumerate(ids) if i in self.cache]
        if new:
            y[new] = self.codec.first.roundtrip(x[new])
        if seen:
            kept = torch.stack([self.cache[ids[k]] for k in seen])
            y[seen] = kept + self.codec.inner.roundtrip(x[seen] - kept)
        for k, number in enumerate(ids):
            self.cache[number] = self.in_8_bits(y[k])
        return y

    @staticmethod
    def in_8_bits(row):
        flat = row.flatten().clone()
        for start in range(0, len(flat), 128):
            part = flat[start : start + 128]
            low, step = part.min(), (part.max() - part.min()) / 255
            flat[start : start + 128] = ((part - low) / step).round() * step + low
        return flat.view(row.shape)


def epochs(count=3, samples=12, batch=4):
    for epoch in range(count):
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(epoch)).tolist()
        for start in range(0, samples, batch):
            yield epoch, order[start : start + batch]


def both(codec):
    return codec.init_state("link/send"), codec.init_state("link/receive")


def passed(codec, states, x, ids):
    """Sent and received; the receiver knows nothing but the payload, its state and the ids."""
    for state in states:
        state.current = state.plan(ids, tuple(x.shape))
    payload = codec.encode(x, states[0])
    return payload, codec.decode(payload, states[1])


@pytest.mark.parametrize("spec", ["delta+block:bits=2", "delta:first=block/bits=6+block:bits=4,group=64",
                                  "delta+rotated:bits=2", "delta+topk:ratio=0.2|block:bits=8"])  # fmt: skip
def test_what_arrives_is_what_a_loop_over_samples_makes(spec):
    codec = parse_codec(spec)
    states, twin = both(codec), Twin(codec)
    for epoch, ids in epochs():
        x = activations(ids, epoch)
        _, y = passed(codec, states, x, ids)
        assert torch.allclose(y, twin(x, ids), atol=2e-6)
        assert all(torch.equal(getattr(states[0], name), getattr(states[1], name)) for name in ("codes", "scales"))
        assert list(states[0].slots.items()) == list(states[1].slots.items())


def test_changes_cost_less_and_lose_less_than_values():
    codec = parse_codec("delta+block:bits=4")
    states, errors = both(codec), {}
    for epoch, ids in epochs():
        x = activations(ids, epoch)
        payload, y = passed(codec, states, x, ids)
        plain = codec.inner.roundtrip(x)
        errors.setdefault(epoch, []).append(float((y - x).norm() / (plain - x).norm()))
        expected = (codec.first if epoch == 0 else codec).payload_nbytes(x.shape, x.dtype)
        assert payload.nbytes == expected == states[0].sent
    assert max(errors[1] + errors[2]) < 0.3
    assert codec.payload_nbytes(x.shape, x.dtype) == codec.inner.payload_nbytes(x.shape, x.dtype) + 8


@pytest.mark.parametrize("evict", ["keep", "lru"])
def test_memory_is_bounded_and_both_sides_drop_the_same(evict):
    codec = parse_codec(f"delta:cache=1,evict={evict}+block:bits=4")
    shape, states = (4096,), both(codec)
    for start in range(0, 600, 30):
        ids = list(range(start, start + 30))
        _, y = passed(codec, states, activations(ids, 0, shape), ids)
        assert torch.isfinite(y).all()
        for state in states:
            assert state.nbytes <= 2**20 and len(state.slots) <= state.capacity
    assert states[0].capacity == 2**20 // (32 * 136)
    kept = set(states[1].slots)
    assert kept == set(range(states[0].capacity) if evict == "keep" else range(600 - states[0].capacity, 600))
    # Known and new samples in one batch, and a place that a row of the same batch needs is not given away.
    ids = [next(iter(states[0].slots)), 1000, 1001, list(states[0].slots)[-1]]
    x = activations(ids, 1, shape)
    _, y = passed(codec, states, x, ids)
    assert float((y - x).norm() / x.norm()) < 0.1
    assert torch.equal(states[0].codes, states[1].codes)
    assert (1000 in states[0].slots) == (evict == "lru")


def test_a_run_goes_on_from_its_state():
    codec = parse_codec("delta+block:bits=2,round=stochastic")
    steps, states = list(epochs(4)), both(codec)
    for epoch, ids in steps[:7]:
        passed(codec, states, activations(ids, epoch), ids)
    again = both(codec)
    for own, other in zip(again, states, strict=True):
        own.load_state_dict(other.state_dict())
    for epoch, ids in steps[7:]:
        x = activations(ids, epoch)
        assert torch.equal(passed(codec, states, x, ids)[1], passed(codec, again, x, ids)[1])
    with pytest.raises(ValueError, match="another codec"):
        again[0].load_state_dict({"error": None})


@pytest.mark.parametrize("what", ["a code", "two codes that changed places", "a scale"])
def test_caches_that_differ_are_noticed(what):
    codec = parse_codec("delta+block:bits=4")
    states = both(codec)
    passed(codec, states, activations([1, 2], 0), [1, 2])
    state = states[1]
    if what == "a code":
        state.codes[1, 5] ^= 1
    elif what == "a scale":
        state.scales[0, 1, 1] *= 1.001
    else:
        state.codes[1, [5, 6]] = state.codes[1, [6, 5]]
        assert state.codes[1, 5] != state.codes[1, 6]
    with pytest.raises(ValueError, match="caches of the two sides differ"):
        passed(codec, states, activations([1, 2], 1), [1, 2])


def test_rows_that_are_not_to_be_remembered():
    codec = parse_codec("delta+block:bits=4")
    states = both(codec)
    ids = [5, -1, 5, -1]  # a repeated one counts once
    passed(codec, states, activations([5, 6, 5, 6], 0), ids)
    assert list(states[0].slots) == [5]
    plan = states[0].plan([5, 7], (2, 9, 9))
    assert plan.new == [0, 1] and plan.kept == []  # another shape
    with pytest.raises(ValueError, match="3 sample ids for a batch of 2 rows"):
        states[0].plan([1, 2, 3], (2, *SHAPE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_over_the_wire(dtype):
    codec = parse_codec("delta+block:bits=4")
    states, others = both(codec), both(codec)
    for epoch, ids in [*epochs(2), (2, [3, 77, 78, 4])]:
        x = activations(ids, epoch).to(dtype)
        for state in (*states, *others):
            state.current = state.plan(ids, tuple(x.shape))
        new = len(states[0].current.new)
        assert new == {0: 4, 1: 0, 2: 2}[epoch]
        wire = WireFormat(codec, tuple(x.shape), dtype, new=new)
        assert wire.encode(x, states[0], buffer := wire.buffer(), 3)
        arrived = wire.decode(buffer, 3, state=states[1])
        expected = codec.decode(codec.encode(x, others[0]), others[1])
        assert torch.equal(arrived, expected) and arrived.dtype == dtype


def test_a_simulated_boundary_does_what_the_link_does():
    codec = parse_codec("delta+block:bits=2")
    layer = nn.Linear(50, 50)
    layer.weight.data, layer.bias.data = torch.eye(50), torch.zeros(50)
    boundary = Boundary("here", codec, codec)
    assert boundary.backward.codec == Block(bits=2)  # gradients have no last epoch
    layer.register_forward_hook(boundary)
    twin = Twin(codec)
    for epoch, ids in epochs():
        x = activations(ids, epoch)
        with sample_ids(torch.tensor(ids)):
            y = layer.train()(x)
        assert torch.allclose(y, twin(x, ids), atol=2e-6)
    with pytest.raises(ValueError, match="which samples a batch holds.*sample_ids"):
        layer(x)
    # Evaluation has other samples, whatever their numbers.
    with sample_ids(ids), torch.no_grad():
        assert torch.equal(layer.eval()(x), codec.first.roundtrip(x))


def test_recomputation_sees_the_first_values():
    from torch.utils.checkpoint import checkpoint

    codec, seen = parse_codec("delta+block:bits=2"), []
    layer = nn.Linear(50, 50)
    layer.register_forward_hook(Boundary("here", codec, Block(bits=8)))
    layer.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    for epoch, ids in epochs(2):
        x = activations(ids, epoch).requires_grad_()
        with sample_ids(ids):
            y = checkpoint(lambda x: layer(x).square(), x, use_reentrant=False)
        y.sum().backward()
        assert torch.equal(seen[-1], seen[-2])
    assert len(seen) == 12


def test_specs():
    for spec in ("delta+block:bits=4", "delta:cache=256,evict=lru+topk:ratio=0.1|block:bits=8",
                 "delta:first=block/bits=6;group=64+block:bits=2"):  # fmt: skip
        assert str(parse_codec(spec)) == spec and parse_codec(str(parse_codec(spec))) == parse_codec(spec)
    for spec, words in {
        "delta": "stands before the codec", "delta:cache=0+block": "cache=0", "delta:evict=new+block": "evict='new'",
        "delta:bits=4+block": "delta has no option 'bits'", "delta+ef+block": "no feedback is needed",
        "ef+delta+block": "write delta", "topk|delta+block": "delta goes around the chain",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=words):
            parse_codec(spec)


def test_without_a_state_everything_goes_in_full():
    codec, x = parse_codec("delta+block:bits=2"), activations([1, 2], 0)
    assert torch.equal(codec.decode(codec.encode(x)), codec.first.roundtrip(x))
    assert torch.equal(codec.roundtrip(x), codec.first.roundtrip(x))


def test_a_cache_smaller_than_a_batch_gives_no_place_twice():
    codec, shape = parse_codec("delta:cache=1,evict=lru+block:bits=4"), (400_000,)
    states = both(codec)
    for ids in ([1, 2, 3, 4], [3, 4, 1, 2]):
        plans = [state.plan(ids, (4, *shape)) for state in states]
        assert plans[0] == plans[1] and states[0].capacity == 2
        assert len(set(plans[0].slots + plans[0].places)) == len(plans[0].slots + plans[0].places)


def test_what_is_not_finite_leaves_the_cache_as_it_was():
    codec = parse_codec("delta+block:bits=8")
    states, ids = both(codec), [3, 4]
    x = activations(ids, 0)
    for bad in (x, x.index_fill(0, torch.tensor([1]), float("nan")), x):
        _, y = passed(codec, states, bad, ids)
        assert torch.isfinite(y).all() == torch.isfinite(bad).all()
    assert torch.allclose(y, x, atol=0.1) and torch.equal(states[0].codes, states[1].codes)
