"""The handle: removing, disabling, evaluation, schedules, statistics and state."""

import copy

import pytest
import torch
from helpers import batch_of, boundaries_on, build, hooks_on, logits_of, points, stack, train_steps
from torch import nn

from hf_actcompress import ActCompressConfig, compress_model
from hf_actcompress.attach import remove_compression
from hf_actcompress.codecs.states import flatten_state, unflatten_state

COARSE = "uniform:bits=1"


def config(codec=COARSE, **options):
    return ActCompressConfig(codec, **options)


def codecs(handle):
    return {name: (str(b.forward.codec), str(b.backward.codec)) for name, b in handle.boundaries.items()}


# Removing


@pytest.mark.parametrize("name", ["bert", "t5", "resnet18"])
def test_remove_leaves_no_hook_and_the_outputs_of_before(name):
    model, batch = build(name).eval(), batch_of(name)
    own = model.register_forward_hook(print_nothing)
    before = hooks_on(model)
    output = logits_of(model, batch)
    handle = compress_model(model, config())
    assert hooks_on(model) != before
    assert not torch.equal(logits_of(model, batch), output)
    rows = handle.stats()
    handle.remove()
    handle.remove()
    assert hooks_on(model) == before == {"": 1}
    assert torch.equal(logits_of(model, batch), output)
    assert handle.stats() == rows
    own.remove()


def print_nothing(module, args, output):
    return None


def test_a_context_removes_hooks_when_an_exception_passes_through():
    model = build("bert")
    with pytest.raises(RuntimeError, match="stop"), compress_model(model, config()):
        assert hooks_on(model)
        raise RuntimeError("stop")
    assert not hooks_on(model)


def test_remove_compression_serves_where_the_handle_is_lost():
    """A copy has none, nor has a notebook whose cell was stopped."""
    model = build("bert")
    handle = compress_model(model, config())
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"remove_compression\(model\)"):
        compress_model(twin, config())
    assert remove_compression(twin) == ["bert.encoder.layer.0", "bert.encoder.layer.3"]
    assert not hooks_on(twin)
    assert remove_compression(twin) == []
    assert boundaries_on(model) == list(handle.boundaries)
    compress_model(twin, config()).remove()


def test_disabled_stops_compression_for_a_while_even_after_an_exception():
    model, batch = build("bert").eval(), batch_of("bert")
    plain = logits_of(model, batch)
    with compress_model(model, config()) as handle:
        lossy = logits_of(model, batch)
        with handle.disabled():
            assert torch.equal(logits_of(model, batch), plain)
            with handle.disabled():
                pass
            assert torch.equal(logits_of(model, batch), plain)
        with pytest.raises(RuntimeError), handle.disabled():
            raise RuntimeError
        assert torch.equal(logits_of(model, batch), lossy)
    assert not torch.equal(plain, lossy)


@pytest.mark.parametrize(("evaluate", "compressed"), [("on", True), ("off", False), ("both", True)])
def test_evaluate(evaluate, compressed):
    model, batch = build("bert").eval(), batch_of("bert")
    plain = logits_of(model, batch)
    with compress_model(model, config(evaluate=evaluate)) as handle:
        assert torch.equal(logits_of(model, batch), plain) != compressed
        assert all(row["calls"] == compressed for row in handle.stats() if row["direction"] == "forward")
        model.train()(**batch)
        assert all(row["calls"] == compressed + 1 for row in handle.stats() if row["direction"] == "forward")


# Schedule


def test_the_schedule_switches_and_spares_layers_named_by_glob():
    schedule = {0: "uniform:bits=8", 1: {"codec": "uniform:bits=12", "grad_codec": "identity"}, 3: "float8"}
    with compress_model(build("bert"), config(schedule=schedule, layers={"encoder.layer.0": COARSE})) as handle:
        seen = []
        for epoch in range(4):
            changed = handle.set_epoch(epoch)
            assert codecs(handle)["bert.encoder.layer.0"] == (COARSE, COARSE)
            seen.append((changed, *codecs(handle)["bert.encoder.layer.3"]))
    assert seen == [
        (False, "uniform:bits=8", "uniform:bits=8"),
        (True, "uniform:bits=12", "identity"),
        (False, "uniform:bits=12", "identity"),
        (True, "float8", "float8"),
    ]


def test_a_switch_keeps_the_state_of_what_does_not_change():
    schedule = {1: {"codec": "kmeans:bits=3", "grad_codec": "kmeans:bits=2"}}
    model = stack()
    with compress_model(model, config("kmeans:bits=2", schedule=schedule)) as handle:
        train_steps(model, [points()])
        boundary = next(iter(handle.boundaries.values()))
        forward, backward = boundary.forward.state, boundary.backward.state
        handle.set_epoch(0)
        assert boundary.forward.state is forward
        handle.set_epoch(1)
        assert boundary.forward.state is not forward
        assert boundary.forward.state.centroids is None
        assert boundary.backward.state is backward


# Statistics and state


def test_statistics_of_a_step_by_hand():
    model = stack(dropout=0.0)
    inputs = {}
    model.head.register_forward_pre_hook(lambda m, args: inputs.update(y=args[0].detach()))
    plain = model.blocks[3].register_forward_hook(lambda m, args, out: inputs.update(x=out.detach()))
    model.train()(points()[0])
    plain.remove()  # under compression it would get what the next layer gets
    with compress_model(model, config("block:bits=4,group=8", grad_codec="identity", first=0, last=1)) as handle:
        model.train()
        torch.nn.functional.cross_entropy(model(points()[0]), points()[1]).backward()
        forward, backward = handle.stats()
    assert (forward["boundary"], forward["layer"]) == ("blocks.3", 3)
    assert [row["direction"] for row in (forward, backward)] == ["forward", "backward"]
    assert [row["codec"] for row in (forward, backward)] == ["block:bits=4,group=8", "identity"]
    raw, payload = 6 * 8 * 4, 6 * 8 // 2 + 6 * 2 * 2  # half a byte per value, two 16-bit scales per group
    assert (forward["raw_bytes"], forward["payload_bytes"], forward["bytes_saved"]) == (raw, payload, raw - payload)
    assert forward["ratio"] == raw / payload
    error = (inputs["y"] - inputs["x"]).norm() / inputs["x"].norm()
    assert forward["rel_error"] == pytest.approx(error.item(), rel=1e-5)
    assert (backward["ratio"], backward["rel_error"], backward["cosine"]) == (1, 0, pytest.approx(1))


@pytest.mark.parametrize("codec", [
    "block:bits=2,round=stochastic", "kmeans:bits=2", "lowrank:rank=2", "ef+kmeans:bits=2",
    "lowrank:rank=2|kmeans:bits=4",
])  # fmt: skip
def test_a_run_goes_on_from_its_state_dict(codec):
    batches = [points(seed=seed) for seed in range(4)]

    def attached(model):
        return compress_model(model, config(codec, first=2, last=1))

    model = stack()
    with attached(model) as handle:
        train_steps(model, batches[:2])
        weights, state = copy.deepcopy(model.state_dict()), handle.state_dict()
        tensors, rest = flatten_state(state)
        whole = train_steps(model, batches[2:])
    model = stack()
    model.load_state_dict(weights)
    with attached(model) as handle:
        assert handle.load_state_dict(unflatten_state(tensors, rest)) == []
        resumed = train_steps(model, batches[2:])
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(whole, resumed, strict=True))
    model.load_state_dict(weights)
    with attached(model):
        fresh = train_steps(model, batches[2:])
    assert not all(torch.equal(a, b) for (_, a), (_, b) in zip(whole, fresh, strict=True))


def test_state_of_another_codec_or_place_is_left_out_and_named():
    with compress_model(stack(), config("kmeans:bits=2")) as handle:
        state = handle.state_dict()
    with compress_model(stack(), config("kmeans:bits=2", grad_codec="kmeans:bits=3", first=2)) as handle:
        missed = ["blocks.0/backward", "blocks.1/forward", "blocks.1/backward", "blocks.3/backward"]
        assert handle.load_state_dict(state) == missed
    with compress_model(stack(), config("identity")) as handle:
        assert handle.load_state_dict(state) == []
        assert handle.state_dict() == {}


def test_flatten_state_round_trips():
    inner = {"i": 3, "t": torch.arange(6.0).view(3, 2).T}
    state = {"a/forward": {"codec": "x", "state": {"t": torch.arange(3.0), "n": None, "in": inner}}}
    tensors, rest = flatten_state(state)
    assert len(tensors) == 2
    assert "tensor(" not in repr(rest)
    again = unflatten_state(tensors, rest)
    assert repr(again) == repr(state)
    assert again["a/forward"]["state"]["in"]["t"].stride() == (1, 2)


def test_a_removed_handle_is_not_entered_again():
    handle = compress_model(build("bert"))
    handle.remove()
    with pytest.raises(ValueError, match="was removed from its model. Call compress_model again"), handle:
        pass


@pytest.mark.parametrize("values", [None, [], {"saved": 1}, {"a/forward": {"codec": "block:bits=4"}}])
def test_state_of_another_form_is_refused(values):
    with compress_model(nn.Sequential(nn.Linear(4, 4)), ActCompressConfig(saved="block:bits=4")) as handle:
        before = handle.state_dict()
        with pytest.raises(ValueError, match="load_state_dict got .*; give it what handle.state_dict"):
            handle.load_state_dict(values)
        assert handle.state_dict() == before
