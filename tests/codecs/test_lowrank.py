import pytest
import torch

from hf_actcompress.codecs import LowRank


def matrix(m, n, seed=0, decay=0.8):
    g = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, min(m, n), generator=g, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, min(m, n), generator=g, dtype=torch.float64)).Q
    return ((u * decay ** torch.arange(min(m, n))) @ v.T).float()


def least_error(x, rank):
    """Eckart and Young: the singular values that are left out."""
    return float(torch.linalg.svdvals(x.double())[rank:].norm())


def error(y, x):
    return float((y.double() - x.double()).norm())


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("shape", [(40, 16), (16, 40), (64, 64)])
@pytest.mark.parametrize("codec", [dict(iters=20), dict(method="svd")])
def test_reaches_the_error_of_the_svd(rank, shape, codec):
    x = matrix(*shape)
    best = least_error(x, rank)
    got = error(LowRank(rank, **codec).roundtrip(x), x)
    assert best * 0.999 <= got <= 1.01 * best


@pytest.mark.parametrize("codec", [dict(), dict(method="svd")])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e12])
def test_a_matrix_of_that_rank_is_exact(codec, scale):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=g) @ torch.randn(4, 30, generator=g) * scale
    for rank in (4, 9, 30):
        assert torch.allclose(LowRank(rank, **codec).roundtrip(x), x, rtol=0, atol=2e-5 * scale)
    assert error(LowRank(3, **codec).roundtrip(x), x) > 0.01 * scale


def test_the_warm_start_improves_from_step_to_step():
    x = matrix(80, 48, decay=0.97)
    codec = LowRank(4)
    state = codec.init_state("s")
    errors = [error(codec.roundtrip(x, state), x) for _ in range(200)]
    cold = error(codec.roundtrip(x), x)
    assert errors[0] == pytest.approx(cold, rel=0.02)
    assert errors[1] < errors[0] and errors[5] < errors[1]
    assert all(b <= a * (1 + 1e-5) for a, b in zip(errors, errors[1:], strict=False))
    assert errors[-1] <= 1.001 * least_error(x, 4) < errors[0]


def test_sites_and_seeds_start_from_different_bases():
    x, codec = matrix(80, 48, decay=0.97), LowRank(4)
    states = [codec.init_state("a"), codec.init_state("a"), codec.init_state("b"), codec.init_state("a", seed=1)]
    a, again, b, c = (codec.roundtrip(x, s) for s in states)
    assert torch.equal(a, again) and not torch.equal(a, b) and not torch.equal(a, c)
    before = torch.get_rng_state()
    codec.roundtrip(x, codec.init_state("z"))
    assert torch.equal(before, torch.get_rng_state())


def test_svd_has_no_state():
    assert LowRank(2, method="svd").init_state("s") is None


@pytest.mark.parametrize("method", ["power", "svd"])
@pytest.mark.parametrize("shape, rows, features", [((5, 7, 6), 35, 6), ((5, 7), 5, 7), ((2, 3, 4, 5, 6), 120, 6)])
def test_features_are_last(method, shape, rows, features):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    codec = LowRank(3, method=method)
    payload = codec.encode(x)
    assert payload.tensors["left"].shape == (rows, 3) and payload.tensors["right"].shape == (features, 3)
    assert torch.equal(codec.decode(payload), codec.roundtrip(x.reshape(rows, features)).view(shape))
    assert payload.nbytes == 4 * 3 * (rows + features)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_images_fold_channels_last(memory):
    b, c, h, w = 2, 5, 4, 3
    x = torch.randn(b, c, h, w, generator=torch.Generator().manual_seed(2))
    folded = torch.empty(b * h * w, c)
    for i in range(b):
        for j in range(h):
            for k in range(w):
                folded[(i * h + j) * w + k] = x[i, :, j, k]
    z = LowRank(2).roundtrip(folded)
    y = LowRank(2).roundtrip(x.to(memory_format=memory))
    for i in range(b):
        for j in range(h):
            for k in range(w):
                torch.testing.assert_close(y[i, :, j, k], z[(i * h + j) * w + k])


def test_a_short_batch_is_kept_at_its_number_of_rows():
    codec = LowRank(8)
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(3))
    payload = codec.encode(x)
    assert payload.tensors["left"].shape == (3, 3) and payload.tensors["right"].shape == (20, 3)
    assert torch.allclose(codec.decode(payload), x, atol=1e-5)
    state = codec.init_state("s")
    full = torch.randn(40, 20, generator=torch.Generator().manual_seed(4))
    for batch in (full, x, full, x[:1]):  # the last batch of an epoch, then the next epoch
        assert codec.encode(batch, state).nbytes == codec.payload_nbytes(batch.shape, batch.dtype)


@pytest.mark.parametrize("shape, folded", [((40, 6), r"\[40, 6\]"), ((2, 6, 4, 4), r"\[32, 6\]"), ((6,), r"\[1, 6\]")])
def test_a_rank_above_the_features_is_refused(shape, folded):
    codec = LowRank(7)
    message = rf"lowrank: rank=7 is above the 6 features .*folded to {folded}\. Use rank <= 6"
    for call in (lambda: codec.encode(torch.zeros(shape)), lambda: codec.payload_nbytes(shape, torch.float32)):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=message):
        codec.roundtrip(torch.zeros(shape))


@pytest.mark.parametrize("kind", ["decaying", "flat", "rank 2", "zero columns"])
def test_warm_steps_equal_plain_subspace_iteration(kind):
    """The slow twin orthogonalises the tall factor in fp64; the codec corrects it by a small matrix."""
    g = torch.Generator().manual_seed(3)
    x = {"decaying": matrix(300, 24), "flat": torch.randn(300, 24, generator=g),
         "rank 2": torch.randn(300, 2, generator=g) @ torch.randn(2, 24, generator=g),
         "zero columns": torch.randn(300, 24, generator=g) * (torch.arange(24) < 3)}[kind]  # fmt: skip
    codec, state = LowRank(4), LowRank(4).init_state("s")
    codec.roundtrip(x, state)
    for _ in range(4):
        basis = state.basis.double()
        x = x + 0.02 * torch.randn(x.shape, generator=g) * (x != 0)
        left = torch.linalg.qr(x.double() @ basis).Q
        torch.testing.assert_close(codec.roundtrip(x, state).double(), left @ (left.T @ x.double()), rtol=0, atol=1e-4)
        turned = torch.linalg.qr(x.double().T @ left).Q
        torch.testing.assert_close(state.basis.double() @ state.basis.double().T, turned @ turned.T, rtol=0, atol=1e-3)


def test_columns_that_are_nearly_parallel_are_orthogonalised():
    x, codec = matrix(200, 30, decay=0.3), LowRank(4)
    state = codec.init_state("s")
    state.basis = torch.ones(30, 4) + 1e-3 * torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    left = torch.linalg.qr(x.double() @ state.basis.double()).Q
    torch.testing.assert_close(codec.roundtrip(x, state).double(), left @ (left.T @ x.double()), rtol=0, atol=1e-4)


def test_a_half_precision_tensor_is_multiplied_in_parts(monkeypatch):
    from hf_actcompress.codecs import lowrank

    for x in (matrix(90, 16).bfloat16(), torch.randn(6, 8, 5, 5, generator=torch.Generator().manual_seed(0)).half()):
        whole = LowRank(3).roundtrip(x)
        monkeypatch.setattr(lowrank, "PART", 100)
        torch.testing.assert_close(LowRank(3).roundtrip(x), whole)
        monkeypatch.undo()


@pytest.mark.parametrize("codec", [LowRank(3), LowRank(3, method="svd")])
def test_what_is_not_finite_comes_out_as_nan_and_is_forgotten(codec):
    x = matrix(60, 20)
    for warm in (False, True):
        state = codec.init_state("s")
        if warm:
            codec.roundtrip(x, state)
        for bad in (float("nan"), float("inf")):
            assert codec.roundtrip(x.index_fill(0, torch.tensor([7]), bad), state).isnan().all()
        errors = [error(codec.roundtrip(x, state), x) for _ in range(4)]  # a first basis has not been improved yet
        assert errors[-1] < 1.2 * least_error(x, 3)


@pytest.mark.parametrize("codec", [LowRank(3), LowRank(3, method="svd")])
def test_values_that_use_all_of_fp32(codec):
    x = matrix(60, 20)
    x = x / x.abs().max()
    for size in (3e38, 1e-35):
        assert error(codec.roundtrip(x * size) / size, x) < 1.2 * least_error(x, 3)
