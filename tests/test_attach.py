"""Attaching finds the right places, says why it cannot, and leaves the model what it was."""

import copy
import pickle
import sys

import pytest
import torch
import transformers
from helpers import TEXT_MODELS, batch_of, boundaries_on, build, hooks_on, logits_of, points, stack, train_steps
from torch import nn

from hf_actcompress import ActCompressConfig, compress_model, find_layers, remove_compression
from hf_actcompress.attach import unwrap

COARSE = "uniform:bits=1"


def config(codec=COARSE, **options):
    return ActCompressConfig(codec, **options)


def codecs(handle):
    return {name: (str(b.forward.codec), str(b.backward.codec)) for name, b in handle.boundaries.items()}


# Where


@pytest.mark.parametrize(("first", "last", "placement", "blocks"), [
    (1, 1, "every", [0, 3]), (2, 2, "every", [0, 1, 2, 3]), (1, 2, "every", [0, 2, 3]), (0, 2, "every", [2, 3]),
    (2, 0, "every", [0, 1]), (2, 2, "cuts", [1, 2]), (1, 1, "cuts", [0, 3]), (0, 3, "cuts", [1]),
    (4, 4, "every", [0, 1, 2, 3]),
])  # fmt: skip
def test_first_and_last_of_a_transformer(first, last, placement, blocks):
    model = build("bert")
    with compress_model(model, config(first=first, last=last, placement=placement)) as handle:
        expected = [f"bert.encoder.layer.{i}" for i in blocks]
        assert list(handle.boundaries) == boundaries_on(model) == expected


def test_the_defaults_and_a_plain_spec():
    with compress_model(build("bert")) as handle:
        assert set(codecs(handle).values()) == {("block:bits=4", "block:bits=4")}
    with compress_model(build("bert"), "sort:bits=8") as handle:
        assert handle.config == ActCompressConfig("sort:bits=8")


def test_saved_alone_leaves_forward_values_alone():
    model = build("bert")
    batch = batch_of("bert")
    with torch.no_grad():
        plain = model.eval()(**batch).logits
        with compress_model(model, config(codec=None, first=None, last=None, saved="block:bits=2")) as handle:
            assert not handle.boundaries
            assert torch.equal(plain, model(**batch).logits)
            handle.set_epoch(1)


BOTH = {"forward": "block:bits=4", "backward": "block:bits=4"}
WIDE = "lowrank:rank=500"


@pytest.mark.parametrize(("options", "message"), [
    ({"codec": WIDE}, r"^codec: .*rank=500"),
    ({"grad_codec": WIDE}, r"^codec: .*rank=500"),
    ({"schedule": {1: WIDE}}, r"^schedule\[1\]: .*rank=500"),
    ({"schedule": {3: {"grad_codec": WIDE}}}, r"^schedule\[3\]: .*rank=500"),
    ({"layers": {"*layer.1": WIDE}}, r"^layers: .*rank=500"),
    ({"layers": {"no.such": "block"}}, r"no\.such"),
    ({"codec": "auto:ratio=8", "resolved": {"no.such": BOTH}}, r"resolved= names 'no\.such', where this model has"),
    ({"codec": "auto:ratio=8", "resolved": {"bert.encoder.layer.0": {**BOTH, "forward": WIDE}}}, r"^resolved\['bert"),
    ({"codec": None, "first": None, "last": None, "saved": WIDE}, r"^saved: .*No layer's output"),
    ({"codec": None, "first": None, "last": None, "saved": WIDE + "|block"}, r"^saved: .*No layer's output"),
])  # fmt: skip
def test_what_cannot_work_is_refused_and_the_model_is_as_it_was(options, message):
    model = build("bert")
    with pytest.raises(ValueError, match=message):
        compress_model(model, config(**options))
    assert not hooks_on(model)


def test_a_failure_while_attaching_leaves_the_model_as_it_was(monkeypatch):
    model = build("bert")

    def fail(*args):
        raise MemoryError("no room for hooks")

    monkeypatch.setattr("hf_actcompress.attach.model.Entry", fail)
    with pytest.raises(MemoryError, match="no room"):
        compress_model(model, config(saved="block:bits=4"))
    assert not hooks_on(model)


def test_disabled_covers_every_site():
    model, batch = build("bert"), batch_of("bert")

    def gradient():
        torch.manual_seed(0)
        model.zero_grad()
        model(**batch).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact = gradient()
    with compress_model(model, config(codec="block:bits=2", saved="block:bits=2")) as handle:
        with handle.disabled():
            with handle.disabled():  # nested: off until the outer one ends
                pass
            assert torch.equal(gradient(), exact)
        assert not torch.equal(gradient(), exact)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc is not glibc's")
@pytest.mark.parametrize("asked", [False, True])
def test_the_allocator_is_left_alone_unless_that_is_asked_for(monkeypatch, asked):
    settings = []
    monkeypatch.setattr("hf_actcompress.ops.cpu.malloc._keep", lambda: settings.append("kept") is None)
    with compress_model(build("bert"), config(saved="block:bits=4", keep_freed_memory=asked)):
        pass
    assert settings == ["kept"] * asked


def test_the_stacks_of_an_encoder_decoder():
    model = build("t5")
    with compress_model(model, config()) as handle:
        assert list(handle.boundaries) == ["encoder.block.0", "encoder.block.3", "decoder.block.0", "decoder.block.3"]
    for stack_, other in (("encoder", "decoder"), ("decoder", "encoder")):
        with compress_model(model, config(stack=stack_)) as handle:
            assert list(handle.boundaries) == [f"{stack_}.block.0", f"{stack_}.block.3"]
        with compress_model(model, config(stack=stack_, layers={f"{other}.block.1": "identity"})) as handle:
            assert set(handle.boundaries) == {f"{stack_}.block.0", f"{stack_}.block.3", f"{other}.block.1"}


def test_layers_override_and_add_by_glob():
    layers = {"encoder.layer.[12]": "kmeans:bits=3", "encoder.layer.3": {"codec": "float8", "grad_codec": "identity"}}
    with compress_model(build("bert"), config(grad_codec="block:bits=8", layers=layers)) as handle:
        assert codecs(handle) == {
            "bert.encoder.layer.0": (COARSE, "block:bits=8"),
            "bert.encoder.layer.1": ("kmeans:bits=3", "block:bits=8"),
            "bert.encoder.layer.2": ("kmeans:bits=3", "block:bits=8"),
            "bert.encoder.layer.3": ("float8", "identity"),
        }


def test_of_two_patterns_the_later_counts():
    with compress_model(build("bert"), config(layers={"*.layer.*": "float8", "*.layer.3": "identity"})) as handle:
        assert [c for c, _ in codecs(handle).values()] == ["float8", "float8", "float8", "identity"]


def test_boundaries_are_listed_in_run_order():
    layers = {"encoder.layer.2": "float8", "encoder.layer.1": "float8"}
    with compress_model(build("bert"), config(layers=layers)) as handle:
        assert [row["layer"] for row in handle.stats()] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_ranks_draw_different_noise(monkeypatch):
    def value(rank):
        monkeypatch.setenv("RANK", rank)
        model = stack(dropout=0.0)
        with compress_model(model, config("block:bits=1,round=stochastic")):
            return model(points()[0])

    assert torch.equal(value("1"), value("1"))
    assert not torch.equal(value("0"), value("1"))


# Refusals


@pytest.mark.parametrize(("options", "message"), [
    ({"first": 5}, r"first=5 is out of range: the model has 5 layers, so choose first from 0 to 4"),
    ({"last": 9}, r"last=9 is out of range: the model has 5 layers, so choose last from 0 to 4"),
    ({"layers": {"encoder.layr.*": COARSE}}, r"^layers\['encoder\.layr\.\*'\] matches no layer.*: bert\.encoder\.l"),
    ({"blocks": ["encoder.layr.*"]}, r"^blocks='encoder\.layr\.\*' matches no module; did you mean bert\.enc"),
    ({"blocks": ["bert.encoder.layer.0", "bert.encoder.layer.0.output"]}, r"^blocks: 'bert.*' lies inside"),
    ({"stack": "decoder"}, r"stack='decoder' is not there"),
])  # fmt: skip
def test_places_that_do_not_exist(options, message):
    model = build("bert")
    with pytest.raises(ValueError, match=message):
        compress_model(model, config(**options))
    assert not hooks_on(model)


@pytest.mark.parametrize(("model", "message"), [
    (3, "A model is a torch.nn.Module, .* got a value of type int"), (None, "got a value of type NoneType"),
    (nn.Linear, "got the class Linear"),
])  # fmt: skip
def test_what_is_no_model(model, message):
    for call in (compress_model, remove_compression, find_layers):
        with pytest.raises(ValueError, match=message):
            call(model)


def test_a_model_without_layers():
    with pytest.raises(ValueError, match=r"no layers in Linear: looked for .* none was found"):
        compress_model(nn.Linear(4, 4))


def test_blocks_may_be_named_where_none_are_found():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.three(self.two(self.one(x)))

    with pytest.raises(ValueError, match="no layers in Odd"):
        compress_model(Odd())
    with compress_model(Odd(), config(blocks=["one", "two"])) as handle:
        assert list(handle.boundaries) == ["one", "two"]


def test_attaching_twice_is_refused_and_says_what_to_do():
    model = build("bert")
    with compress_model(model, config()) as handle:
        with pytest.raises(ValueError, match=r"compressed already .*bert\.encoder\.layer\.0.*handle\.remove\(\)"):
            compress_model(model, config())
        assert boundaries_on(model) == list(handle.boundaries)
    compress_model(model, config()).remove()


def test_a_rank_above_the_features_is_refused_at_once_and_leaves_no_hook():
    model = build("bert")
    features = model.config.hidden_size
    with pytest.raises(ValueError, match=rf"bert\.encoder\.layer\.0: lowrank: rank={features + 1} .* Use rank <= "):
        compress_model(model, f"lowrank:rank={features + 1}")
    with pytest.raises(ValueError, match="rank=999"):
        compress_model(model, ActCompressConfig("block:bits=4", grad_codec="lowrank:rank=999"))
    assert not hooks_on(model)
    compress_model(model, f"lowrank:rank={features}").remove()


# The model stays what it was


def test_state_dict_and_save_pretrained_do_not_see_the_boundaries(tmp_path):
    model, batch = build("bert").eval(), batch_of("bert")
    keys, plain = list(model.state_dict()), logits_of(model, batch)
    with compress_model(model, config()):
        assert list(model.state_dict()) == keys
        model.save_pretrained(tmp_path)
        lossy = logits_of(model, batch)
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert not hooks_on(again)
    assert torch.equal(logits_of(again, batch), plain)
    with compress_model(again, config()):
        assert torch.equal(logits_of(again, batch), lossy)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("codec", [COARSE, "block:bits=2,round=stochastic", "ef+kmeans:bits=2"])
def test_copies_are_compressed_and_independent(duplicate, codec):
    model, batches = build("bert"), [batch_of("bert", seed) for seed in range(3)]
    with compress_model(model, config(codec)) as handle:
        train_steps(model, batches[:1])
        twin = duplicate(model)
        assert boundaries_on(twin) == list(handle.boundaries)
        calls, state = [row["calls"] for row in handle.stats()], handle.state_dict()
        one = train_steps(twin, batches[1:])
        assert [row["calls"] for row in handle.stats()] == calls
        assert repr(handle.state_dict()) == repr(state)
        two = train_steps(model, batches[1:])
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one, two, strict=True))
    handle.remove()
    assert boundaries_on(twin)


@pytest.mark.parametrize("name", [*TEXT_MODELS, "t5", "vit"])
def test_outputs_keep_their_type(name):
    model, batch = build(name).eval(), batch_of(name)

    def kinds():
        found = {}
        hooks = [
            m.register_forward_hook(lambda m, a, out, n=n: found.update({n: shape_of(out)}))
            for n, m in model.named_modules()
        ]
        with torch.no_grad():
            found["result"] = shape_of(model(**batch, output_hidden_states=True))
        for hook in hooks:
            hook.remove()
        return found

    plain = kinds()
    with compress_model(model, config(first=2, last=2)):
        assert kinds() == plain


def shape_of(value):
    """Types and shapes, all the way down."""
    if isinstance(value, torch.Tensor):
        return (type(value), value.dtype, tuple(value.shape))
    if isinstance(value, dict):
        return (type(value), {key: shape_of(item) for key, item in value.items()})
    if isinstance(value, (tuple, list)):
        return (type(value), [shape_of(item) for item in value])
    return type(value)


def test_the_model_inside_of_wrappers():
    model = stack()
    for wrapped in (torch.compile(model), nn.DataParallel(model), torch.compile(nn.DataParallel(model))):
        assert unwrap(wrapped) is model
    with compress_model(torch.compile(model), config()) as handle:
        assert list(handle.boundaries) == boundaries_on(model) == ["blocks.0", "blocks.3"]


def test_attaching_leaves_random_numbers_and_modes_alone():
    model = build("resnet18").train()
    model.layer1.eval()
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    with compress_model(model, config()):
        drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
