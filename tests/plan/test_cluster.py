"""Clusters from YAML: what is read, and errors that name the key."""

import pytest

from hf_actcompress.plan.cluster import CODECS, bandwidth, parse_cluster, read_cluster, seconds
from hf_actcompress.plan.simulate import Link, Stage

WHOLE = """
microbatches: 16
schedule: early-1f1b
ahead: 3
devices:
  - {name: laptop, flops: 200G, codec_speed: 0.5}
  - {name: server, count: 2, flops: 8T}
  - {name: slow}
stages:
  - {flops: 14G, activation: [4, 128, 384], optimizer: 5ms}
  - {count: 2, flops: 8G, backward: 3ms, activation: [4, 128, 384], dtype: bf16}
  - {forward: 40ms, weight: 0.3}
links:
  - {bandwidth: 100mbit, latency: 20ms}
  - {between: [server 2, slow], bandwidth: 12.5MB}
  - {bandwidth: 1gbit}
codecs: {none: identity, mine: ["block:bits=4", "block:bits=8"], cast: bf16}
"""


def changed(**keys):
    """A small description that is right, with some keys changed."""
    stage = {"forward": "40ms", "activation": [4, 8]}
    whole = {"microbatches": 4, "stages": [stage, dict(stage)], "links": {"bandwidth": "1mbit"}, **keys}
    return {key: value for key, value in whole.items() if value is not None}


def test_all_that_a_file_can_say(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(WHOLE)
    found = read_cluster(path)
    assert found.devices == ["laptop", "server 1", "server 2", "slow"]
    assert found.codec_speed == [0.5, 1, 1, 1]
    assert found.stages[0] == Stage(0.07, 0.14, 0.005)
    assert found.stages[1] == found.stages[2] == Stage(0.001, 0.003)
    assert found.stages[3] == Stage(0.04, 0.08, weight=0.3)
    assert found.shapes == [(4, 128, 384)] * 3 and found.dtypes == ["fp32", "bf16", "bf16"]
    assert found.links == {(0, 1): Link(12.5e6, 0.02), (1, 2): Link(125e6), (2, 3): Link(12.5e6)}
    assert (found.microbatches, found.rows, found.schedule, found.ahead) == (16, 4, "early-1f1b", 3)
    assert found.codecs == {"none": ("identity",) * 2, "mine": ("block:bits=4", "block:bits=8"), "cast": ("bf16",) * 2}


def test_what_a_file_need_not_say():
    found = parse_cluster(changed())
    assert found.stages == [Stage(0.04, 0.08)] * 2 and found.devices == ["device 0", "device 1"]
    assert (found.schedule, found.ahead, found.rows, found.codecs) == ("early-1f1b", 2, 4, CODECS)


def test_one_link_between_a_client_and_a_server():
    stage = {"forward": 1, "activation": [2]}
    devices = [{"name": "client"}, {"name": "server"}]
    found = parse_cluster(changed(stages=[{"count": 4, **stage}], devices=devices, schedule="zbv"))
    assert found.links == {(0, 1): Link(125000)}


@pytest.mark.parametrize(("text", "value"), [
    ("100mbit", 12.5e6), ("1gbit", 125e6), ("56 kbit/s", 7000), ("12.5MB", 12.5e6), ("800bps", 100), ("2Gbit", 250e6),
])  # fmt: skip
def test_bandwidths(text, value):
    assert bandwidth(text) == pytest.approx(value)


@pytest.mark.parametrize(("text", "value"), [("5ms", 0.005), ("40us", 4e-5), (2, 2.0), ("1.5s", 1.5), ("2min", 120)])
def test_times(text, value):
    assert seconds(text, "x") == pytest.approx(value)


STAGE = {"forward": "1ms", "activation": [4]}


@pytest.mark.parametrize(("keys", "message"), [
    ({"stages": None}, "The description lacks 'stages'"),
    ({"microbatch": 3}, "The description has no key 'microbatch'. Did you mean 'microbatches'? Keys: "),
    ({"microbatches": "many"}, "microbatches: 'many' is not a whole number of 1 or more"),
    ({"microbatches": True}, "microbatches: True is not a whole number"),
    ({"microbatches": 1}, "stages, devices and schedule do not fit: early-1f1b: 1 micro-batches; at least 2"),
    ({"schedule": "2f2b"}, "schedule: '2f2b' is unknown. Schedules: early-1f1b, 1f1b, gpipe, interleaved, zbv"),
    ({"schedule": "zbv"}, "'zbv' needs two stages per device; there are 2 stages on 2 devices"),
    ({"devices": [{"name": "a"}] * 3}, "'early-1f1b' needs as many stages as devices; there are 2 stages on 3"),
    ({"stages": []}, "stages: [] is not a list with at least one entry"),
    ({"stages": ["x"]}, "stages[0]: 'x' is not a mapping with the keys count, flops, forward"),
    ({"stages": [STAGE, {"fwd": 1}]}, "stages[1] has no key 'fwd'. Did you mean 'forward'? Keys: count"),
    ({"stages": [{**STAGE, "forward": "40 parsecs"}, STAGE]}, "stages[0].forward: '40 parsecs' is not a time such as"),
    ({"stages": [{**STAGE, "forward": "-1ms"}, STAGE]}, "stages[0].forward: '-1ms' is not a time such as"),
    ({"stages": [{**STAGE, "flops": "1G"}, STAGE]}, "stages[0]: give either 'forward'"),
    ({"stages": [{"flops": "1G", "activation": [4]}, STAGE]}, "stages[0].flops needs the speed of its device: give"),
    ({"stages": [{"forward": 1}, STAGE]}, "stages[0].activation: None is not the shape"),
    ({"stages": [{**STAGE, "activation": [0]}, STAGE]}, "stages[0].activation: [0] is not the shape"),
    ({"stages": [{**STAGE, "dtype": "int8"}, STAGE]}, "stages[0].dtype: 'int8' is not one of fp32, bf16, fp16"),
    ({"stages": [{**STAGE, "weight": 2}, STAGE]}, "stages[0].weight: 2 is not a share from 0 to 1"),
    ({"stages": [{**STAGE, "count": 0}, STAGE]}, "stages[0].count: 0 is not a whole number of 1 or more"),
    ({"devices": [{"flops": "fast"}, {}]}, "devices[0].flops: 'fast' is not a number of floating-point operations"),
    ({"devices": [{"codec_speed": 0}, {}]}, "devices[0].codec_speed: 0 is not a number above 0"),
    ({"links": {"bandwidth": "fast"}}, "links.bandwidth: 'fast' is not a bandwidth above 0 such as 100mbit"),
    ({"links": {"bandwidth": "0mbit"}}, "links.bandwidth: '0mbit' is not a bandwidth above 0"),
    ({"links": {"latency": "1ms"}}, "links lacks 'bandwidth'"),
    ({"links": [{"between": ["device 0", "nobody"], "bandwidth": "1mbit"}]}, "links[0].between: ['device 0', 'nobody']"
     " does not name two devices of: device 0, device 1"),
    ({"links": [{"between": ["device 0", "device 0"], "bandwidth": "1mbit"}]}, "links: none between 'device 0' and"),
    ({"codecs": {"x": "blok:bits=4"}}, "codecs.x: Unknown codec 'blok'"),
    ({"codecs": {"x": ["identity"] * 3}}, "codecs.x: ['identity', 'identity', 'identity'] is neither one spec"),
    ({"codecs": 4}, "codecs: 4 is neither a list of specs nor a mapping"),
])  # fmt: skip
def test_errors_name_the_key(keys, message):
    with pytest.raises(ValueError) as error:
        parse_cluster(changed(**keys))
    assert message in str(error.value)


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "x.yaml"
    for content, message in (("stages: [", "is not YAML"), ("- 1", "is not a mapping with the keys microbatches")):
        path.write_text(content)
        with pytest.raises(ValueError) as error:
            read_cluster(path)
        assert message in str(error.value) and "x.yaml" in str(error.value)
    with pytest.raises(ValueError, match="nowhere.yaml' cannot be read: No such file"):
        read_cluster(tmp_path / "nowhere.yaml")
