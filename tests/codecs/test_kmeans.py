import numpy as np
import pytest
import torch

from hf_actcompress.codecs import KMeans
from hf_actcompress.ops.codebooks import lloyd, optimal_codebook


def best_error(values, k):
    """The least squared error of k centroids for the sorted values: D[m][j] = min over i of D[m-1][i] + cost(i, j)."""
    v = np.sort(np.asarray(values, dtype=np.float64))
    n = len(v)
    v = v - v.mean()
    s, q = np.concatenate([[0], v.cumsum()]), np.concatenate([[0], (v * v).cumsum()])

    def cost(j):  # of one centroid for v[i:j], all i < j
        i = np.arange(j)
        return q[j] - q[i] - (s[j] - s[i]) ** 2 / (j - i)

    costs = [None] + [cost(j) for j in range(1, n + 1)]
    best = np.array([0.0] + [c[0] for c in costs[1:]])
    for _ in range(k - 1):
        best = np.array([0.0] + [(best[:j] + costs[j]).min() for j in range(1, n + 1)])
    return max(best[n], 0.0)


def data(kind, n, seed=0):
    g = np.random.default_rng(seed)
    x = {
        "gauss": lambda: g.normal(size=n),
        "bimodal": lambda: np.where(g.random(n) < 0.3, g.normal(-5, 0.2, n), g.normal(3, 1, n)),
        "discrete": lambda: g.integers(-4, 5, n).astype(float),
        "outliers": lambda: np.where(g.random(n) < 0.02, 50.0, 1.0) * g.normal(size=n),
        "heavy": lambda: g.standard_t(2, n),
        "half zeros": lambda: np.maximum(g.normal(size=n), 0),
        "uniform": lambda: g.random(n),
        "far away": lambda: 1000 + g.normal(size=n),
    }[kind]()
    return torch.tensor(x, dtype=torch.float32)


KINDS = ["gauss", "bimodal", "discrete", "outliers", "heavy", "half zeros", "uniform", "far away"]


def error(codec, x, state=None):
    return float((codec.roundtrip(x, state).double() - x.double()).pow(2).sum())


def room(x):
    """Rounding of centroids to fp32."""
    return len(x) * (2.0**-23 * float(x.abs().max())) ** 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [5, 40, 300])
def test_within_one_percent_of_the_optimum(kind, bits, n):
    x = data(kind, n, seed=bits)
    assert error(KMeans(bits), x) <= 1.01 * best_error(x, 2**bits) + room(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4])
def test_near_the_optimum_where_the_codebook_comes_from_bins(kind, bits):
    x = data(kind, 1500, seed=bits)
    assert error(KMeans(bits), x) <= 1.02 * best_error(x, 2**bits) + room(x)


@pytest.mark.parametrize("kind", ["gauss", "uniform", "far away", "discrete"])
def test_codebooks_of_more_than_32_come_from_a_density(kind):
    """Not for heavy tails, where this start is several times worse than the optimum."""
    x = data(kind, 1500)
    assert error(KMeans(6), x) <= 1.25 * best_error(x, 64) + room(x)


@pytest.mark.parametrize("kind", ["gauss", "bimodal", "half zeros", "uniform", "far away"])
def test_a_sample_serves_a_large_tensor(kind):
    """Lloyd over all values, from the codebook of the sample, gains next to nothing."""
    x = data(kind, 150_000)
    payload = KMeans(4).encode(x)
    points = x.double().sort().values
    table = lloyd(points, payload.tensors["centroids"].double(), 200)
    least = float((x.double()[:, None] - table).abs().min(1).values.pow(2).sum())
    assert 1.0001 * least < error(KMeans(4), x) <= 1.04 * least + room(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 4])
def test_each_value_gets_the_nearest_centroid(kind, bits):
    x = data(kind, 3000)
    payload = KMeans(bits).encode(x)
    table = payload.tensors["centroids"]
    assert table.shape == (2**bits,) and table.dtype == torch.float32 and (table.diff() >= 0).all()
    distance = (x.double()[:, None] - table.double()).abs().min(1).values
    y = KMeans(bits).decode(payload)
    assert torch.allclose((y - x).double().abs(), distance, rtol=1e-5, atol=1e-6 * float(x.abs().max()))
    assert torch.isin(y, table).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4])
def test_the_warm_start_follows_scale_and_offset(kind, bits):
    codec = KMeans(bits)
    state = codec.init_state()
    for step in range(10):
        x = data(kind, 300) * 1.7**step - 3 * step
        got = error(codec, x, state)
    assert got <= 1.01 * best_error(x, 2**bits) + room(x)


@pytest.mark.parametrize("kind", ["gauss", "bimodal", "half zeros", "uniform"])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_warm_start_serves_fresh_values_as_well_as_a_cold_one(kind, bits):
    codec = KMeans(bits)
    state = codec.init_state()
    for step in range(8):
        x = data(kind, 4000, seed=step) * 1.7**step
        ratio = error(codec, x, state) / error(codec, x)
    assert ratio <= 1.2


def test_the_warm_start_is_used():
    codec, x = KMeans(3, iters=1), data("gauss", 4000)
    state = codec.init_state()
    codec.encode(x, state)
    y = data("uniform", 4000)
    warm = codec.encode(y, state).tensors["centroids"]
    assert not torch.equal(warm, codec.encode(y).tensors["centroids"])
    for _ in range(60):
        warm = codec.encode(y, state).tensors["centroids"]
    assert float((codec.roundtrip(y, state) - y).pow(2).mean()) <= 1.01 * float((codec.roundtrip(y) - y).pow(2).mean())


@pytest.mark.parametrize("first", [torch.tensor([0.0, 0, 1, 5]), torch.zeros(50), torch.tensor([0.1]).expand(30)])
def test_a_poor_first_tensor_does_not_spoil_the_next(first):
    codec, x = KMeans(4), data("gauss", 2000)
    state = codec.init_state()
    codec.encode(first, state)
    errors = [error(codec, x, state) for _ in range(2)]
    assert errors[-1] <= 1.05 * error(codec, x)


def test_the_state_survives_a_checkpoint_and_a_change_of_bits():
    codec, x = KMeans(4), data("gauss", 600)
    state = codec.init_state()
    codec.encode(x, state)
    loaded = codec.init_state()
    loaded.load_state_dict(state.state_dict())
    assert torch.equal(loaded.centroids, state.centroids) and loaded.centroids.dtype == torch.float32
    assert codec.roundtrip(2 * x, loaded).equal(codec.roundtrip(2 * x, state))
    assert error(KMeans(2), x, state) == error(KMeans(2), x), "a codebook of another size is not a start"


@pytest.mark.parametrize("seed", range(5))
def test_optimal_codebook_with_weights_is_that_of_repeated_points(seed):
    g = np.random.default_rng(seed)
    values = torch.tensor(np.sort(g.normal(size=30)))
    weights = torch.tensor(g.integers(1, 6, 30).astype(float))
    repeated = values.repeat_interleave(weights.long())
    table = optimal_codebook(values, weights, 4)
    cost = float((repeated[:, None] - table).abs().min(1).values.pow(2).sum())
    assert cost == pytest.approx(best_error(repeated, 4))


def test_lloyd_never_gets_worse():
    points = data("bimodal", 500).double().sort().values
    table = points[:8].clone()

    def cost(t):
        return float((points[:, None] - t).abs().min(1).values.pow(2).sum())

    costs = [cost(table)]
    for _ in range(30):
        table = lloyd(points, table, 1)
        costs.append(cost(table))
    assert all(b <= a * (1 + 1e-12) for a, b in zip(costs, costs[1:], strict=False)) and costs[-1] < costs[0] / 3


def test_payload_by_hand():
    assert KMeans(3).payload_nbytes((100,), torch.float32) == 104 * 3 // 8 + 32
