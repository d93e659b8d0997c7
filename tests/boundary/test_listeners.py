"""What a boundary tells its listeners: bytes and errors for the meter, and measurements on the side."""


import pytest
import torch
from helpers.boundaries import STATEFUL, attach, meter, metered, values
from torch import nn

from hf_actcompress.codecs import parse_codec
from hf_actcompress.observe.meter import Meter


def test_bytes_and_errors_by_hand():
    codec = parse_codec("block:bits=4,group=16")
    layer = nn.Identity().train()
    boundary = attach(layer, str(codec), meter_every=2)
    xs = [values(4, 16, seed=s) for s in range(3)]
    ys = [layer(x) for x in xs]
    record = meter(boundary.forward).record()
    assert (record["calls"], record["raw_bytes"]) == (3, 3 * 64 * 4)
    assert record["payload_bytes"] == 3 * codec.encode(xs[0]).nbytes == 3 * (64 // 2 + 4 * 4)
    assert record["ratio"] == pytest.approx(256 / 48)
    sampled = [((y - x).norm() / x.norm()).item() for x, y in ((xs[0], ys[0]), (xs[2], ys[2]))]
    assert record["rel_error"] == pytest.approx(sum(sampled) / 2, rel=1e-5)
    cosines = [torch.cosine_similarity(xs[i].flatten(), ys[i].flatten(), dim=0).item() for i in (0, 2)]
    assert record["cosine"] == pytest.approx(sum(cosines) / 2, rel=1e-5)
    assert meter(boundary.backward).record() == Meter().record()


def make_layouts():
    base = values(40, 64, 24)
    return {
        "contiguous": base,
        "transposed": base.transpose(0, 2),
        "channels_last": values(8, 16, 20, 20).to(memory_format=torch.channels_last),
        "sliced": values(40, 64, 50)[:, :, ::2],
        "sliced and transposed": values(40, 64, 50)[:, :, ::2].transpose(1, 2),
        "expanded": values(40, 1, 24).expand(40, 64, 24),
        "expanded from one value": torch.tensor(2.0).expand(40, 64, 24),
    }


@pytest.mark.parametrize("layout", make_layouts())
def test_the_error_compares_the_same_places_in_any_layout(layout):
    """The gradient of a sum over tokens is an expanded tensor, with strides of zero."""
    x = make_layouts()[layout]
    assert x.numel() > 1 << 14
    channel = metered("identity")
    assert torch.equal(channel(x), x)
    assert meter(channel).record()["rel_error"] == 0
    channel = metered("uniform:bits=3")
    y = channel(x)
    exact = ((y - x).double().norm() / x.double().norm()).item()
    assert meter(channel).record()["rel_error"] == pytest.approx(exact, rel=0.05, abs=1e-9)


@pytest.mark.parametrize("spec", STATEFUL)
def test_metering_changes_no_value(spec):
    def run(every):
        layer = nn.Identity().train()
        boundary = attach(layer, spec, spec, meter_every=every)
        outputs = []
        for step in range(3):
            x = values(6, 16, seed=step).requires_grad_()
            y = layer(x)
            y.backward(x.detach())
            outputs += [y.detach(), x.grad]
        return outputs, meter(boundary.forward)

    (never, silent), (always, loud) = run(0), run(1)
    assert (silent.counts().samples, loud.counts().samples) == (0, 3)
    assert silent.payload_bytes == loud.payload_bytes
    assert all(torch.equal(a, b) for a, b in zip(never, always, strict=True))


# Measurements


@pytest.mark.parametrize("spec", STATEFUL)
def test_isolated_works_on_copies_and_tells_other_listeners(spec):
    def run(measure):
        layer, outputs, seen = nn.Identity().train(), [], []
        boundary = attach(layer, spec, spec)
        for step in range(3):
            x = values(6, 16, seed=step).requires_grad_()
            if measure:
                with boundary.isolated(seen.append):
                    layer(values(6, 16, seed=step).requires_grad_()).backward(x.detach())
            y = layer(x)
            y.backward(x.detach())
            outputs += [y.detach(), x.grad]
        return outputs, meter(boundary.forward), seen

    (plain, counted, _), (measured, other, events) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, measured, strict=True))
    assert counted.calls == other.calls == 3 and counted.counts().error == other.counts().error
    assert [(e.site, e.name, e.direction) for e in events[:2]] == [
        ("boundary", "the.layer", "forward"), ("boundary", "the.layer", "backward"),
    ]  # fmt: skip
    assert torch.equal(events[0].decode(), plain[0]) and events[0].raw_bytes == 6 * 16 * 4 > events[0].payload_bytes


def test_candidates_replace_the_codecs_for_a_while():
    layer = nn.Identity().train()
    boundary, seen = attach(layer, "uniform:bits=1", "uniform:bits=1"), []
    boundary.enabled = False
    with boundary.candidates(seen.append) as channels:
        x = values(6, 16).requires_grad_()
        layer(x).backward(x.detach())
        assert torch.equal(x.grad, x) and not seen
        channels["backward"].codec = parse_codec("kmeans:bits=1")
        first, second = (torch.autograd.grad(layer(x), x, values(6, 16, seed=1))[0] for _ in range(2))
        assert torch.equal(first, second) and first.unique().numel() == 2
        assert [event.direction for event in seen] == ["backward", "backward"]
    assert not boundary.enabled and str(boundary.backward.codec) == "uniform:bits=1"
    assert meter(boundary.backward).calls == 0
