import pytest
import torch

from hf_actcompress.codecs import parse_codec
from hf_actcompress.ops import rows
from hf_actcompress.ops.compiled import Kernel
from hf_actcompress.ops.rows import apply, blocks, counters, parts


@pytest.mark.parametrize("n", [1, 7, 8, 15, 16, 17, 100, 1000])
@pytest.mark.parametrize("cols", [8, 16, 24])
@pytest.mark.parametrize("period", [1, 2, 5])
@pytest.mark.parametrize("whole", [False, True])
def test_parts_hold_the_tensor_and_repeat_its_last_value(n, cols, period, whole):
    flat = torch.arange(n, dtype=torch.float32) - 3
    found = parts(n, cols, period, cols if whole else 0)
    taken = [part.take(flat) for part in found]
    assert [tuple(x.shape) for x in taken] == [part.shape for part in found]
    joined = torch.cat([x.reshape(-1) for x in taken])
    assert torch.equal(joined[:n], flat) and (joined[n:] == flat[-1]).all()
    assert len(joined) - n < (cols if whole else 8)
    assert all(part.shape[2] % 8 == 0 and part.shape[1] <= period for part in found)
    assert [int(c) for part in found for c in counters(part, flat.device).view(-1)] == list(range(0, n, cols))
    # A table of one period says the same of an element as its index does.
    table = torch.arange(period * cols)
    for part, x in zip(found, taken, strict=True):
        expected = torch.where(x + 3 < n, (x + 3) % (period * cols), -1).long()
        features = part.features(table).expand(part.shape)
        real = torch.arange(x.numel()).view(x.shape) < part.numel
        assert torch.equal(features[real], expected[real])


def test_whole_groups_are_views():
    flat = torch.zeros(50)
    parts(50, 16)[0].take(flat).fill_(1)
    assert flat.sum() == 48


@pytest.mark.parametrize("n, k, cols", [(1, 1, 8), (10, 3, 8), (1000, 1, 8), (7, 900, 2**9), (3, 2, 2**20)])
def test_blocks_cover_every_group_once_and_in_order(n, k, cols):
    seen = []
    for i, j in blocks(n, k, cols, torch.device("cpu")):
        own = [a * k + b for a in range(n)[i] for b in range(k)[j]]
        assert own == list(range(own[0], own[-1] + 1)), "a block is a run of groups"
        assert len(own) <= max(1, rows.TILE // cols)
        seen += own
    assert seen == list(range(n * k))
    assert list(blocks(n, k, cols, torch.device("meta"))) == [(slice(0, n), slice(0, k))]


def test_apply_joins_the_tiles(monkeypatch):
    def scaled(x, row, table, factor):
        return x * row + table * factor, x.amax(-1)

    monkeypatch.setattr(rows, "TILE", 16)
    x, row, table = torch.randn(5, 3, 8), torch.randn(5, 3, 1), torch.randn(3, 8)
    y, top = apply(Kernel(scaled), x, [row], [table], [torch.tensor(2.0)])
    assert torch.equal(y, x * row + table * 2) and torch.equal(top, x.amax(-1))


@pytest.mark.parametrize(
    "spec",
    ["uniform:bits=3", "uniform:bits=12,round=stochastic", "block:bits=5,group=24", "block:bits=4,round=stochastic",
     "block:bits=9,dim=channel,round=stochastic", "rotated:bits=4",
     "sort:bits=6", "sort:bits=12", "kmeans:bits=3"],
)  # fmt: skip
@pytest.mark.parametrize("tile", [1, 100, 1 << 11])
def test_the_size_of_a_tile_changes_nothing(monkeypatch, spec, tile):
    codec = parse_codec(spec)
    x = torch.randn(11, 1009, generator=torch.Generator().manual_seed(0))
    whole = codec.encode(x, codec.init_state("s"))
    y, again = codec.decode(whole), codec.roundtrip(x, codec.init_state("s"))
    monkeypatch.setattr(rows, "TILE", tile)
    cut = codec.encode(x, codec.init_state("s"))
    assert all(torch.equal(cut.tensors[name], t) for name, t in whole.tensors.items())
    assert torch.equal(codec.decode(cut), y) and torch.equal(codec.decode(whole), y)
    assert torch.equal(codec.roundtrip(x, codec.init_state("s")), y) and torch.equal(again, y)


def test_a_shorter_tail_is_quantized_as_if_alone():
    """Offsets into codes and scales: each group decodes to what it gives on its own."""
    codec = parse_codec("block:bits=6,group=64")
    x = torch.randn(64 * 5 + 19, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([codec.roundtrip(part) for part in x.split(64)])
    assert torch.equal(codec.roundtrip(x), alone) and torch.equal(codec.decode(codec.encode(x)), alone)
