import numpy as np
import pytest
import torch

from hf_actcompress.ops.packing import code_dtype, pack, packed_nbytes, planes, unpack

BITS = range(1, 17)


def slow_pack(codes, bits):
    """The layout of the module's docstring, bit by bit: planes, widest first; byte j joins element j of every run."""
    rows = []
    for row in codes.tolist():
        out, left = [], bits
        while left:
            width = max(w for w in (1, 2, 4, 8) if w <= left)
            left -= width
            run = len(row) * width // 8
            for j in range(run):
                byte = 0
                for k, code in enumerate(row[j::run]):
                    byte += (code // 2**left % 2**width) * 2 ** (k * width)
                out.append(byte)
        rows.append(out)
    return torch.tensor(rows, dtype=torch.uint8)


def random_codes(bits, rows, cols, seed=0):
    values = np.random.default_rng(seed).integers(0, 2**bits, (rows, cols))
    values.flat[0], values.flat[-1] = 2**bits - 1, 0
    return torch.from_numpy(values).to(code_dtype(bits))


@pytest.mark.parametrize("bits", BITS)
def test_planes_cover_every_bit_once(bits):
    covered = [bit for width, shift in planes(bits) for bit in range(shift, shift + width)]
    assert sorted(covered) == list(range(bits))
    assert [w for w, _ in planes(bits)] == sorted((w for w, _ in planes(bits)), reverse=True)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows, cols", [(1, 8), (3, 16), (2, 24), (5, 136)])
def test_pack_equals_the_slow_twin(bits, rows, cols):
    codes = random_codes(bits, rows, cols)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, cols * bits // 8) and packed.is_contiguous()
    assert torch.equal(packed, slow_pack(codes, bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows, cols", [(1, 8), (3, 16), (2, 24), (5, 1032)])
def test_unpack_is_the_inverse(bits, rows, cols):
    codes = random_codes(bits, rows, cols, seed=1)
    before = codes.clone()
    back = unpack(pack(codes, bits), bits, cols)
    assert back.dtype == codes.dtype and torch.equal(back, codes) and torch.equal(codes, before)


@pytest.mark.parametrize("bits", BITS)
def test_packing_reads_any_memory_layout(bits):
    codes = random_codes(bits, 16, 24)
    assert torch.equal(pack(codes.t().contiguous().t(), bits), pack(codes, bits))
    wide = torch.zeros(16, 48, dtype=codes.dtype)
    wide[:, ::2] = codes
    assert torch.equal(pack(wide[:, ::2], bits), pack(codes, bits))
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed.t().contiguous().t(), bits, 24), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1000])
def test_packed_nbytes(bits, n):
    padded = next(m for m in range(n, n + 8) if m % 8 == 0)
    assert packed_nbytes(n, bits) * 8 == padded * bits


def test_one_code_touches_only_its_own_bits():
    for bits in BITS:
        zero = torch.zeros(1, 32, dtype=code_dtype(bits))
        seen = torch.zeros(1, 32 * bits // 8, dtype=torch.uint8)
        for i in range(32):
            one = zero.clone()
            one[0, i] = 2**bits - 1
            mark = pack(one, bits)
            assert not (mark & seen).any()
            seen |= mark
        assert (seen == 255).all()
