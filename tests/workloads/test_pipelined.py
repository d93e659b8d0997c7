"""Arguments of pipeline scripts are checked before data and model are loaded."""

import pytest

from hf_actcompress.workloads.pipelined import parse_pipeline_arguments


@pytest.mark.parametrize("option", ["--codec", "--grad_codec"])
def test_a_wrong_codec_is_named_by_its_option(option):
    with pytest.raises(ValueError, match=f"^{option}: Unknown codec 'blok'"):
        parse_pipeline_arguments([], [option, "blok"], {})
    (args,) = parse_pipeline_arguments([], [option, "none"], {})
    assert getattr(args, option[2:]) == "none"
