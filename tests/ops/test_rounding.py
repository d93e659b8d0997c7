import pytest
import torch

from hf_actcompress.codecs.rounding import RoundingState, next_key
from hf_actcompress.ops.groups import counters
from hf_actcompress.ops.rounding import noise, noise_key

CPU = torch.device("cpu")
MASK = 0xFFFFFFFF


def hash_noise(rows, cols, key, start, device):
    """The noise of `rows` groups of `cols` elements, from the flat index `start` on."""
    return noise(counters(start // cols, torch.empty(rows, cols, device=device), cols), key)


M1, M2 = 0x7FEB352D, 0x846CA68B


def slow_noise(index, key):
    """lowbias32 of (index mod 2**32) xor key in Python's integers; the upper 24 bits as a fraction."""
    h = (index & MASK) ^ (key & MASK)
    h ^= h >> 16
    h = h * M1 & MASK
    h ^= h >> 15
    h = h * M2 & MASK
    h ^= h >> 16
    return (h >> 8) / 2**24


def unmix(h):
    """The inverse of lowbias32."""
    h ^= h >> 16
    h = h * pow(M2, -1, 2**32) & MASK
    h ^= (h >> 15) ^ (h >> 30)
    h = h * pow(M1, -1, 2**32) & MASK
    return h ^ (h >> 16)


@pytest.mark.parametrize("key", [0, 1, -1, 123456789, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("rows, cols, row0", [(1, 1, 0), (3, 8, 0), (5, 128, 77), (2, 1024, 2**20)])
def test_noise_equals_the_slow_twin(key, rows, cols, row0):
    got = hash_noise(rows, cols, key, row0 * cols, CPU)
    start = row0 * cols
    expected = [[slow_noise(start + r * cols + c, key) for c in range(cols)] for r in range(rows)]
    assert got.dtype == torch.float32
    assert torch.equal(got.double(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("edge", [2**31, 2**32, 2**33, 3 * 2**32])
def test_the_counter_wraps_at_two_to_the_32(edge):
    for cols in (8, 1024, 24):
        row0 = edge // cols - 1
        got = hash_noise(4, cols, 42, row0 * cols, CPU).view(-1).tolist()
        assert got == [slow_noise(row0 * cols + i, 42) for i in range(4 * cols)]
    assert torch.equal(hash_noise(2, 8, 42, 2**32 + 40, CPU), hash_noise(2, 8, 42, 40, CPU))


def test_the_range_is_zero_to_below_one():
    key = 987654321
    for h, value in ((0, 0.0), (0xFF, 0.0), (0xFFFFFFFF, 1 - 2**-24), (0xFFFFFF00, 1 - 2**-24), (0x80000000, 0.5)):
        index = unmix(h) ^ key
        assert hash_noise(1, 1, key, index, CPU).item() == value < 1


@pytest.mark.parametrize("key", [0, 5, -77777, 2**30 + 1])
def test_noise_is_uniform(key):
    n = 2**20
    u = hash_noise(n // 1024, 1024, key, 0, CPU).double().view(-1)
    # What rounding needs: P(u < p) = p.  1.95 / sqrt(n) is the Kolmogorov-Smirnov bound of level 0.001.
    rank = torch.arange(n, dtype=torch.float64) / n
    assert float((u.sort().values - rank).abs().max()) < 1.95 / n**0.5
    # Bin by bin this mixer is a little less even than chance (1.2 +- 0.09 times the expected chi-square).
    for bins in (256, 1000):
        count = torch.bincount((u * bins).long(), minlength=bins)
        assert float(((count - n / bins) ** 2 / (n / bins)).sum()) < 1.6 * (bins - 1)
    assert abs(float(u.mean()) - 0.5) < 4 * (1 / 12 / n) ** 0.5
    assert abs(float(u.var()) - 1 / 12) < 4 * (1 / 180 / n) ** 0.5
    low = (u * 2**24).long() & 0xFF  # the low bits too
    chi2 = float(((torch.bincount(low, minlength=256) - n / 256) ** 2 / (n / 256)).sum())
    assert abs(chi2 - 255) < 4 * (2 * 255) ** 0.5


@pytest.mark.parametrize("lag", [1, 2, 3, 7, 64, 128, 1023, 1024, 4096, 65536])
def test_noise_has_no_serial_correlation(lag):
    u = hash_noise(1024, 1024, 99, 0, CPU).double().view(-1) - 0.5
    r = float((u[lag:] * u[:-lag]).mean() * 12)
    assert abs(r) < 4 / (len(u) - lag) ** 0.5


@pytest.mark.parametrize("other", [dict(step=1), dict(step=2), dict(site=1), dict(seed=1), dict(site=2**31)])
def test_steps_sites_and_seeds_are_independent(other):
    a = hash_noise(512, 1024, noise_key(**{"seed": 0, "site": 0, "step": 0}), 0, CPU).double().view(-1)
    b = hash_noise(512, 1024, noise_key(**{"seed": 0, "site": 0, "step": 0, **other}), 0, CPU).double().view(-1)
    r = float(((a - 0.5) * (b - 0.5)).mean() * 12)
    assert abs(r) < 4 / len(a) ** 0.5
    assert float((a == b).double().mean()) < 1e-4


def test_keys_hardly_collide():
    keys = {noise_key(seed, site, step) for seed in range(4) for site in range(32) for step in range(256)}
    assert all(-(2**31) <= k < 2**31 for k in keys)
    assert len(keys) > 4 * 32 * 256 - 8  # 0.13 pairs expected among 2**15 of 2**32


def test_the_state_counts_and_reproduces():
    one, two, third = RoundingState("a", 7), RoundingState("a", 7), RoundingState("b", 7)
    torch.manual_seed(0)
    keys = [one.next_key() for _ in range(50)]
    torch.manual_seed(1)
    assert keys == [two.next_key() for _ in range(50)] and len(set(keys)) == 50
    assert not set(keys) & {third.next_key() for _ in range(50)}
    assert RoundingState("a", 8).next_key() not in keys
    assert next_key(None) == next_key(None) == noise_key(0, 0, 0)
    assert next_key(one) == noise_key(7, one.site, 50)
