import pytest
import torch

from hf_actcompress.codecs import parse_codec, rows
from hf_actcompress.codecs.rows import piece_shapes, row_pieces, tiles


@pytest.mark.parametrize("n", [1, 7, 8, 15, 16, 17, 100])
@pytest.mark.parametrize("cols", [8, 16, 24])
@pytest.mark.parametrize("whole", [False, True])
def test_pieces_hold_the_tensor_and_repeat_its_last_value(n, cols, whole):
    flat = torch.arange(n, dtype=torch.float32) - 3
    pad_to = cols if whole else 0
    pieces = row_pieces(flat, cols, pad_to)
    assert [tuple(p.shape) for p in pieces] == piece_shapes(n, cols, pad_to)
    joined = torch.cat([p.reshape(-1) for p in pieces])
    assert torch.equal(joined[:n], flat) and (joined[n:] == flat[-1]).all()
    assert len(joined) - n < (cols if whole else 8)
    assert all(p.shape[1] % 8 == 0 for p in pieces)


def test_full_rows_are_views():
    flat = torch.zeros(50)
    row_pieces(flat, 16)[0].fill_(1)
    assert flat.sum() == 48


@pytest.mark.parametrize("count, cols", [(1, 8), (10, 8), (1000, 8), (3, 2**20)])
def test_tiles_cover_every_row_once(count, cols):
    spans = list(tiles(count, cols, torch.device("cpu")))
    assert [r for a, b in spans for r in range(a, b)] == list(range(count))
    assert max(b - a for a, b in spans) <= max(1, rows.TILE // cols)
    assert list(tiles(count, cols, torch.device("meta"))) == [(0, count)]


@pytest.mark.parametrize(
    "spec",
    ["uniform:bits=3", "uniform:bits=12,round=stochastic", "block:bits=5,group=24", "block:bits=4,round=stochastic",
     "block:bits=2,splits=7", "block:bits=9,dim=channel,round=stochastic", "block:bits=4,levels=gauss",
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
