"""Each compression is the nearest point of its kind, by brute force or optimality conditions; bits are as stated."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_actcompress.weights.compressions import parse_compression
from hf_actcompress.weights.restore import restore
from hf_actcompress.weights.stream import Reader, Writer
from hf_actcompress.workloads.lenet import LeNet5


def compress(spec, *tensors, mu=None):
    return parse_compression(spec).compress(tensors, mu)


def error(form, *tensors):
    return sum(float((x - y).double().square().sum()) for x, y in zip(tensors, form.values(), strict=True))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


floats = st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=7).map(torch.tensor)
SPECS = [
    "codebook:k=1", "codebook:k=2", "codebook:k=5", "codebook:k=3,joint=true", "binary", "ternary",
    "ternary:joint=true", "prune:keep=0", "prune:keep=7", "prune:keep=20%", "prune:keep=100%", "prune:l0=1e-2",
    "prune:l1=0.1", "prune:l1_norm=9", "prune:keep=9,k=3", "prune:l0=1e-2,k=2", "prune:keep=3,joint=false",
    "lowrank:rank=0", "lowrank:rank=2", "lowrank:rank=4", "lowrank:rank=auto,alpha=1e-2", "block:bits=3",
    "topk:ratio=0.2|uniform:bits=8", "codec:lowrank:rank=2,method=svd", "codebook:k=2 + prune:keep=5%",
    "lowrank:rank=1 + codebook:k=2 + prune:keep=3",
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_stored_form_gives_the_same_values_and_the_counted_bits(spec):
    tensors = [randn(6, 7), randn(5, 2, 3, 3, seed=1)[:, :, 0]]
    form = compress(spec, *tensors, mu=1.0)
    assert [tuple(v.shape) for v in form.values()] == [(6, 7), (5, 2, 3)]
    out = Writer()
    stored = form.store(out)
    streams = out.joined()
    size = 8 * sum(s.numel() * s.element_size() for s in streams.values())
    # Packed fields end at whole bytes; there are at most three in each part.
    assert form.bits <= size <= form.bits + 7 * 3 * 3
    source = Reader(streams)
    again = restore(stored, list(form.shapes), source)
    source.finish()
    assert again.bits == form.bits
    for a, b in zip(form.values(), again.values(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("spec", SPECS)
def test_specs_come_back_as_text(spec):
    compression = parse_compression(spec)
    assert parse_compression(str(compression)) == compression


@pytest.mark.parametrize("spec", SPECS)
def test_empty_constant_and_half_precision_tensors(spec):
    for x in (torch.zeros(4, 4), torch.full((4, 4), -0.5), randn(4, 4).bfloat16()):
        values = compress(spec, x, mu=1.0).values()
        assert torch.isfinite(values[0]).all()


@pytest.mark.parametrize("k", [2, 4])
def test_two_entries_everywhere_on_lenet5_give_the_known_ratio(k):
    """ceil(log2 k) N + 32 k bits for each of the four weights, biases with 32 bits on both sides."""
    model = LeNet5()
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = 32 * sum(p.numel() for p in model.parameters() if p.dim() == 1)
    total = 32 * sum(p.numel() for p in model.parameters())
    assert total == 32 * 431_080
    bits = compress(f"codebook:k={k}", *weights).bits
    assert bits == math.log2(k) * 430_500 + 4 * 32 * k
    assert round(total / (bits + biases), 1) == {2: 30.7, 4: 15.7}[k]


# Nearest points


@given(floats)
def test_binary(x):
    form = compress("binary", x)
    scale = x.abs().max().item()
    tries = np.linspace(0, scale, 201)
    least = min(float(((x.abs() - a) ** 2).sum()) for a in tries)
    assert error(form, x) <= least + 1e-5
    assert form.bits == x.numel() + 32


@given(floats)
def test_ternary(x):
    form = compress("ternary", x)
    least = float((x**2).sum())
    for kept in itertools.product((0, 1), repeat=x.numel()):
        mask = torch.tensor(kept).bool()
        if mask.any():
            a = x[mask].abs().mean()
            least = min(least, float(((x - mask * x.sign() * a) ** 2).sum()))
    assert error(form, x) == pytest.approx(least, abs=1e-5)
    assert form.bits == 2 * x.numel() + 32


@given(floats, st.integers(0, 8))
def test_pruning_keeps_the_largest_and_none_of_none(x, keep):
    form = compress(f"prune:keep={keep}", x)
    (y,) = form.values()
    assert int((y != 0).sum()) <= keep
    assert (y[y != 0] == x[y != 0]).all()
    dropped = x.abs().sort().values[: max(x.numel() - keep, 0)]
    assert error(form, x) == pytest.approx(float((dropped**2).sum()), abs=1e-5)


@given(floats, st.floats(0, 20))
def test_projection_onto_the_l1_ball(x, radius):
    """By its optimality conditions: within the ball, all shrunk by the same amount and no further."""
    (y,) = compress(f"prune:l1_norm={radius}", x).values()
    if x.abs().sum() <= radius:
        assert torch.equal(y, x)
        return
    assert float(y.abs().sum()) == pytest.approx(radius, abs=1e-4)
    shrunk = (x - y)[y != 0] * x[y != 0].sign()
    if len(shrunk):
        assert shrunk.max() - shrunk.min() < 1e-4
        assert (x[y == 0].abs() <= shrunk.mean() + 1e-4).all()


def test_the_l1_ball_with_a_known_answer():
    (y,) = compress("prune:l1_norm=1", torch.tensor([3.0, -2.5, 1.0])).values()
    torch.testing.assert_close(y, torch.tensor([0.75, -0.25, 0.0]))


@given(floats, st.floats(0.01, 5), st.floats(0.1, 5))
def test_penalties_are_minimised(x, weight, mu):
    for spec, cost in ((f"prune:l0={weight}", lambda v: (v != 0).double()), (f"prune:l1={weight}", torch.abs)):
        (y,) = compress(spec, x, mu=mu).values()
        grid = torch.cat([torch.linspace(-9, 9, 3601), x]).double()[:, None]
        best = (weight * cost(grid) + mu / 2 * (grid - x.double()) ** 2).min(0).values
        own = weight * cost(y.double()) + mu / 2 * (y - x).double() ** 2
        assert (own <= best + 1e-4).all()


def test_penalties_with_known_answers():
    x = torch.tensor([0.9, -1.1, 2.0])
    for spec, expected in (("prune:l0=2", [0, -1.1, 2]), ("prune:l1=4", [0, -0.1, 1]), ("prune:l0=2,k=1", [0, 0, 2])):
        (y,) = compress(spec, x, mu=4.0).values()  # l0: above 1; l1: by 1; k=1: -1.1 is no 2
        torch.testing.assert_close(y, torch.tensor(expected).float(), msg=spec)


def test_pruning_is_joint_unless_told_otherwise():
    small, large = torch.full((3,), 0.1), torch.full((3,), 1.0)
    assert [int((v != 0).sum()) for v in compress("prune:keep=3", small, large).values()] == [0, 3]
    assert [int((v != 0).sum()) for v in compress("prune:keep=2,joint=false", small, large).values()] == [2, 2]


@given(floats, st.integers(1, 6), st.integers(1, 3))
def test_a_codebook_for_what_stays(x, keep, k):
    """Never worse than keeping the largest magnitudes and then choosing the best codebook for them."""
    form = compress(f"prune:keep={keep},k={k}", x)
    (y,) = form.values()
    assert int((y != 0).sum()) <= keep and len(set(y[y != 0].tolist())) <= k
    kept = x[x.abs().sort(descending=True).indices[:keep]]
    simple = float((x**2).sum() - (kept**2).sum()) + error(compress(f"codebook:k={k}", kept), kept)
    assert error(form, x) <= simple + 1e-4


# Low rank


@pytest.mark.parametrize("shape", [(12, 9), (6, 2, 3, 3)])
def test_fixed_rank_is_the_truncated_svd(shape):
    x = randn(*shape)
    matrix = x.reshape(shape[0], -1)
    s = torch.linalg.svdvals(matrix)
    for rank in range(len(s) + 1):
        form = compress(f"lowrank:rank={rank}", x)
        assert error(form, x) == pytest.approx(float((s[rank:] ** 2).sum()), abs=1e-3)
        assert form.bits == 32 * min(rank * sum(matrix.shape), matrix.numel())


@pytest.mark.parametrize("alpha", [0, 1e-3, 1e-2, 0.1, 1, 10])
def test_the_chosen_rank_costs_least_and_never_more_than_dense(alpha):
    x = randn(20, 10) @ torch.diag(torch.logspace(0, -3, 10)) @ randn(10, 14, seed=1)
    mu, s = 0.5, torch.linalg.svdvals(x).double()
    form = compress(f"lowrank:rank=auto,alpha={alpha}", x, mu=mu)
    own = alpha * form.bits / 32 + mu / 2 * error(form, x)
    costs = [alpha * min(r * 34, 280) + mu / 2 * float((s[r:] ** 2).sum()) for r in range(len(s) + 1)]
    assert own == pytest.approx(min(costs), rel=1e-5, abs=1e-6)
    assert form.bits <= 32 * 280


def test_a_flat_spectrum_is_left_dense_where_factors_cost_more():
    form = compress("lowrank:rank=auto,alpha=0.05", torch.eye(8), mu=1.0)
    assert form.bits == 32 * 64 and error(form, torch.eye(8)) < 1e-9
    assert compress("lowrank:rank=auto,alpha=0.07", torch.eye(8), mu=1.0).bits == 0  # 64 alpha against 8 / 2


def test_values_do_not_depend_on_the_number_of_threads():
    form = compress("lowrank:rank=30", randn(300, 200))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        (one,) = form.values()
        torch.set_num_threads(2)
        (two,) = form.values()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)


# Sums


def test_a_sum_is_better_than_one_sweep_and_than_its_parts():
    x = randn(40, 50)
    x.view(-1)[::97] *= 12
    form = compress("codebook:k=2 + prune:keep=2%", x)
    first = compress("codebook:k=2", x)
    rest = x - first.values()[0]
    sweep = error(compress("prune:keep=2%", rest), rest)
    assert error(form, x) < 0.99 * sweep < error(first, x)
    assert form.bits == sum(part.bits for part in form.parts)


def test_alternation_goes_on_from_an_earlier_result():
    x = randn(30, 30)
    compression = parse_compression("codebook:k=4 + prune:keep=3%")
    first = compression.compress([x])
    assert error(compression.compress([x], start=first), x) <= error(first, x) * (1 + 1e-6)


# Bad input


@pytest.mark.parametrize(("spec", "message"), [
    ("codebok:k=2", "Unknown compression 'codebok'.*Did you mean 'codebook'.*codecs: .*identity"),
    ("codebook:k=0", "k=0 is not an integer from 1"),
    ("codebook:q=2", "codebook has no option 'q'.*Options: k, joint"),
    ("codebook:k=2,k=3", "gives k twice"),
    ("codebook:k", "is not option=value"),
    ("prune", "exactly one of keep=, l0=, l1= and l1_norm=; got none"),
    ("prune:keep=3,l0=1", r"exactly one of .* got \['keep', 'l0'\]"),
    ("prune:keep=-1", "keep=-1 is not a count such as 104 or a share"),
    ("prune:keep=0.5", "keep='0.5' is not a count"),
    ("prune:keep=101%", "keep='101%' is not"),
    ("prune:l1=1,k=4", "goes with keep= or l0="),
    ("lowrank", "rank=auto needs alpha="),
    ("lowrank:rank=3,alpha=1", "a fixed rank takes none"),
    ("lowrank:rank=x", "not an integer of 0 or more, or auto"),
    ("block:bits=99", "bits=99"),
    ("delta+block:bits=4", "cannot compress weights"),
    ("", "such as 'codebook:k=2'"),
    ("codebook:k=2 + nonsense", "Unknown compression 'nonsense'"),
])  # fmt: skip
def test_wrong_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_compression(spec)


@pytest.mark.parametrize(("spec", "x", "message"), [
    ("prune:l0=1", torch.zeros(3), "give mu > 0"),
    ("lowrank:rank=9", torch.zeros(8, 4), r"above 4, .* up to rank 2"),
    ("lowrank:rank=1", torch.zeros(8), "is no matrix"),
    ("codebook:k=2", torch.tensor([1.0, math.nan]), "NaN or Inf"),
])  # fmt: skip
def test_wrong_tensors(spec, x, message):
    with pytest.raises(ValueError, match=message):
        compress(spec, x)
