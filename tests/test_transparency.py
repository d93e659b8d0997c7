"""With the identity codec every loss, gradient, parameter and buffer stays the same, bit for bit, in every wrapper."""

import copy
import shutil

import pytest
import torch
from helpers import TEXT_MODELS, batch_of, boundaries_on, build, differing, hooks_on, points, stack, train_steps

from hf_actcompress import ActCompressConfig, compress_model

TIMM = ("mobilenetv2_100", "efficientnet_lite0", "resnet18", "vit_tiny_patch16_224", "convnext_atto")
IDENTITY = ActCompressConfig("identity", first=2, last=2)
# Codecs whose result depends on what they saw before.
STATEFUL = ("block:bits=3,round=stochastic", "kmeans:bits=2", "lowrank:rank=2", "ef+uniform:bits=2")


def identity(placement):
    return ActCompressConfig("identity", first=2, last=2, placement=placement)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("name", [*TEXT_MODELS, "vit", "t5"])
def test_transformers(name, optimizer):
    check(name, [batch_of(name, seed) for seed in range(3)], optimizer)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    check(name, [batch_of(name, seed) for seed in range(3)], "AdamW")


def check(name, batches, optimizer):
    model = build(name)
    plain = train_steps(copy.deepcopy(model), batches, optimizer)
    for placement in ("every", "cuts"):
        twin = copy.deepcopy(model)
        with compress_model(twin, identity(placement)) as handle:
            # An encoder-decoder has boundaries in both stacks.
            assert len(boundaries_on(twin)) == (4 if placement == "every" else 2) * (2 if name == "t5" else 1)
            assert not differing(plain, train_steps(twin, batches, optimizer))
            rows = handle.stats()
        assert all(row["calls"] == 3 and row["ratio"] == 1 and row["rel_error"] == 0 for row in rows)
        assert len(rows) == 2 * len(handle.boundaries)


@pytest.mark.parametrize("name", ["bert", "resnet18"])
def test_a_lossy_codec_does_change_training(name):
    """Else the tests above could pass with hooks that never run."""
    model, batches = build(name), [batch_of(name, seed) for seed in range(2)]
    plain = train_steps(copy.deepcopy(model), batches)
    with compress_model(model, ActCompressConfig("uniform:bits=4", first=1, last=1)):
        changed = differing(plain, train_steps(model, batches))
    assert {"loss", "state:" + list(model.state_dict())[0]} <= set(changed)


@pytest.mark.parametrize("direction", ["codec", "grad_codec"])
def test_each_direction_alone_changes_what_it_should(direction):
    model, batches = build("bert"), [batch_of("bert")]
    plain = train_steps(copy.deepcopy(model), batches, "SGD")
    options = {"codec": "identity", "grad_codec": "identity", direction: "uniform:bits=2"}
    with compress_model(model, ActCompressConfig(**options, first=0, last=1)):
        changed = set(differing(plain, train_steps(model, batches, "SGD")))
    assert ("loss" in changed) == (direction == "codec")
    assert "bert.encoder.layer.0.output.dense.weight" in changed
    assert ("classifier.weight" in changed) == (direction == "codec")


def test_channels_last_images():
    model = build("resnet18").to(memory_format=torch.channels_last)
    batches = [(x.to(memory_format=torch.channels_last), y) for x, y in (batch_of("resnet18", s) for s in range(2))]
    plain = train_steps(copy.deepcopy(model), batches)
    with compress_model(model, IDENTITY):
        assert not differing(plain, train_steps(model, batches))


@pytest.mark.parametrize("name", ["bert", "mobilenetv2_100"])
def test_bf16_autocast(name):
    model, batches = build(name), [batch_of(name, seed) for seed in range(2)]
    plain = train_steps(copy.deepcopy(model), batches, autocast=True)
    with compress_model(model, IDENTITY) as handle:
        assert not differing(plain, train_steps(model, batches, autocast=True))
    if name == "mobilenetv2_100":  # what leaves a convolution under autocast has two bytes per value
        (row,) = [r for r in handle.stats() if r["boundary"] == "blocks.0.0" and r["direction"] == "forward"]
        assert row["raw_bytes"] == 2 * 2 * (4 * 16 * 16 * 16)


# Activation checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("codec", ["identity", *STATEFUL])
def test_the_checkpointing_of_transformers_changes_nothing(codec, reentrant):
    model, batches = build("bert"), [batch_of("bert", seed) for seed in range(3)]
    twin = copy.deepcopy(model)
    config = ActCompressConfig(codec, first=2, last=2)
    with compress_model(model, config):
        plain = train_steps(model, batches)
    twin.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with compress_model(twin, config):
        # Reentrant checkpointing needs a first input with a gradient.
        twin.enable_input_require_grads()
        assert not differing(plain, train_steps(twin, batches))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("codec", ["identity", *STATEFUL, "lowrank:rank=2|uniform:bits=4"])
def test_a_recomputed_forward_replays_the_codecs_state(codec, segments, reentrant):
    """Here the hooks are inside of what torch's checkpoint recomputes."""
    batches = [points(seed=seed) for seed in range(4)]
    config = ActCompressConfig(codec, first=2, last=2, layers={"blocks.*": codec})
    model = stack()
    with compress_model(model, config) as handle:
        plain = train_steps(model, batches)
        calls = {row["calls"] for row in handle.stats()}
        state = handle.state_dict()
    model = stack(segments=segments, reentrant=reentrant)
    with compress_model(model, config) as handle:
        assert not differing(plain, train_steps(model, batches))
        # Recomputation is no further call: neither counted, nor seen by the state.
        assert {row["calls"] for row in handle.stats()} == calls == {4}
        assert_same(handle.state_dict(), state)


def assert_same(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.mark.parametrize("codec", ["identity", "kmeans:bits=3"])
def test_the_checkpointing_of_timm(codec):
    model, batches = build("vit_tiny_patch16_224"), [batch_of("vit_tiny_patch16_224", seed) for seed in range(2)]
    twin = copy.deepcopy(model)
    config = ActCompressConfig(codec, first=1, last=1)
    with compress_model(model, config):
        plain = train_steps(model, batches)
    twin.set_grad_checkpointing(True)
    with compress_model(twin, config):
        assert not differing(plain, train_steps(twin, batches))


def test_checkpointing_with_several_micro_batches_under_way():
    """All forwards run before the first backward, as in a pipeline: each recomputation needs its own state."""
    config = ActCompressConfig("block:bits=2,round=stochastic", first=2, last=1)

    def gradients(model):
        torch.manual_seed(3)
        with compress_model(model.train(), config):
            losses = [torch.nn.functional.cross_entropy(model(x), y) for x, y in map(points, (6, 5, 4))]
            for loss in losses:
                loss.backward()
        return [p.grad for p in model.parameters()]

    plain, again = gradients(stack()), gradients(stack(segments=2))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


# torch.compile


def compiled_trace(model, batches, backend, config=None):
    torch._dynamo.reset()
    if config is None:
        return train_steps(torch.compile(model, backend=backend), batches)
    with compress_model(model, config) as handle:
        trace = train_steps(torch.compile(model, backend=backend), batches)
        assert {row["calls"] for row in handle.stats()} == {len(batches)}
    return trace


@pytest.mark.parametrize(("make", "batch", "backend", "codec"), [
    (lambda: build("bert"), lambda seed: batch_of("bert", seed), "eager", "identity"),
    (stack, lambda seed: points(seed=seed), "aot_eager", "kmeans:bits=2"),
], ids=["bert-eager-identity", "stack-aot_eager-kmeans:bits=2"])  # fmt: skip
def test_compiled_models(make, batch, backend, codec):
    """Dropout draws the same numbers in these backends, so the model that is not compiled is the measure."""
    batches, config = [batch(seed) for seed in range(2)], ActCompressConfig(codec, first=2, last=1)
    if codec == "identity":
        plain = train_steps(make(), batches)
    else:
        model = make()
        with compress_model(model, config):
            plain = train_steps(model, batches)
    again = compiled_trace(make(), batches, backend, config)
    again = [(name.replace("_orig_mod.", ""), value) for name, value in again]
    assert not differing(plain, again)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of torch.compile is not installed")
def test_inductor():
    """Inductor fuses what the boundaries keep apart, hence a tolerance."""
    batches = [points(seed=seed) for seed in range(2)]
    plain = compiled_trace(stack(blocks=3, dropout=0.0), batches, "inductor")
    again = compiled_trace(stack(blocks=3, dropout=0.0), batches, "inductor", ActCompressConfig("identity"))
    for (name, one), (_, other) in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_hooks_that_come_and_go_around_a_compiled_model():
    """The graph is guarded on its hooks: attaching again, or late, compresses; removing stops it."""
    torch._dynamo.reset()
    model, batches = build("bert"), [batch_of("bert")]
    start = copy.deepcopy(model.state_dict())
    graph = torch.compile(model, backend="eager")

    def run():
        model.load_state_dict(start)
        return [(name.replace("_orig_mod.", ""), value) for name, value in train_steps(graph, batches)]

    plain, config = run(), ActCompressConfig("uniform:bits=2")
    with compress_model(graph, config) as late:
        lossy = run()
    assert {row["calls"] for row in late.stats()} == {1}
    assert "loss" in differing(plain, lossy)
    assert not differing(plain, run())
    with compress_model(graph, config) as again:
        assert not differing(lossy, run())
    assert {row["calls"] for row in again.stats()} == {1}
    assert not hooks_on(model)
