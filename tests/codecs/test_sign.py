"""Signs and mean magnitudes against the definition, and with error feedback on a quadratic."""

import pytest
import torch

from hf_actcompress.codecs import Sign, parse_codec


@pytest.mark.parametrize("shape", [(), (5,), (40,), (3, 50)])
def test_each_value_becomes_the_mean_magnitude_of_its_group(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = Sign(group=16).roundtrip(x).view(-1)
    for group, found in zip(x.view(-1).split(16), y.split(16), strict=True):
        size = float(group.abs().mean().bfloat16())
        assert found.tolist() == [size if v >= 0 else -size for v in group.tolist()]


def test_the_payload_by_hand_and_what_is_refused():
    assert Sign(group=16).payload_nbytes((3, 50), torch.float32) == 10 * (2 + 2)
    with pytest.raises(ValueError, match="group=12 is not a multiple of 8"):
        parse_codec("sign:group=12")


def test_feedback_makes_up_for_the_lost_magnitudes():
    """Gradient descent on |w - goal|**2: signs alone stay away from the goal, with feedback they reach it."""
    goal, far = torch.randn(1000, generator=torch.Generator().manual_seed(1)) ** 3, {}
    for spec in ("sign", "ef+sign"):
        codec, w = parse_codec(spec), torch.zeros(1000)
        state = codec.init_state("a")
        for _ in range(300):
            w -= 0.05 * codec.roundtrip(w - goal, state)
        far[spec] = float((w - goal).norm() / goal.norm())
    assert far["ef+sign"] < 0.02 < 0.1 < far["sign"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_group_of_an_infinity_becomes_nan(dtype):
    x = torch.randn(4, 128).to(dtype)
    x[2, 5] = torch.inf
    y = parse_codec("sign").roundtrip(x)
    assert y[2].isnan().all() and y[[0, 1, 3]].isfinite().all()
