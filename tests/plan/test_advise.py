"""What advise measures is what is there, and what it says follows from the numbers."""

import multiprocessing

import pytest
import torch
from helpers import build, text_batch

from hf_actcompress import parse_codec
from hf_actcompress.pipeline import split
from hf_actcompress.pipeline.wire import HEADER
from hf_actcompress.plan.advise import choose, predict, verdict
from hf_actcompress.plan.cluster import parse_cluster
from hf_actcompress.plan.contention import background_load
from hf_actcompress.plan.measure import Work, measure_codec, measure_stages
from hf_actcompress.plan.simulate import Traffic

SHAPE = (2, 16, 32)
FAST, SLOW = "10gbit", "1mbit"


def small_work():
    batch = text_batch(rows=1)
    return Work(split(build("bert"), stages=2), (batch["input_ids"],), {})


def broken_work():
    raise ValueError("no stages here")


def cluster(rate, **keys):
    stage = {"forward": "10ms", "backward": "20ms", "activation": list(SHAPE)}
    return parse_cluster({"microbatches": 8, "stages": [stage] * 2, "links": {"bandwidth": rate}, **keys})


def made_up(spec, shape, dtype):
    """Known sizes and speeds instead of a measurement."""
    size = {"identity": 4096, "bf16": 2048, "block:bits=4": 600}.get(spec, 1100)
    return Traffic(size, *(0.0 if spec == "identity" else 0.001,) * 2)


def test_stages_are_run_forward_and_back():
    modules, batch = split(build("bert"), stages=3), text_batch(rows=2)
    turns = []
    stages, shapes, dtypes = measure_stages(
        Work(modules, (batch["input_ids"],), {"attention_mask": batch["attention_mask"]}), repeats=2,
        tick=lambda: turns.append(1),
    )  # fmt: skip
    assert len(stages) == 3 and len(turns) == 9
    assert all(stage.forward > 0 and stage.backward > 0 and stage.optimizer > 0 for stage in stages)
    assert shapes == [(2, batch["input_ids"].shape[1], 16)] * 2 and dtypes == ["fp32"] * 2


def test_measuring_changes_no_weight():
    model, batch = build("bert"), text_batch(rows=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure_stages(Work(split(model, stages=2), (batch["input_ids"],), {}), repeats=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_background_load_works_until_the_measurement_ends():
    before = multiprocessing.active_children()
    with background_load(1, small_work):
        (child,) = [p for p in multiprocessing.active_children() if p not in before]
        assert child.is_alive()
    assert not child.is_alive()
    with pytest.raises(RuntimeError, match="ended with exit code 1"), background_load(1, broken_work):
        pass


@pytest.mark.parametrize("spec", ["identity", "block:bits=4", "topk:ratio=0.1|uniform:bits=8", "ef+topk:ratio=0.2"])
def test_bytes_are_those_of_payload_and_header(spec):
    found = measure_codec(spec, SHAPE, "fp32", repeats=1)
    assert found.nbytes == parse_codec(spec).payload_nbytes(SHAPE, torch.float32) + HEADER
    assert found.encode > 0 and found.decode > 0


def test_a_cast_and_changes_of_what_was_seen():
    raw = 2 * 16 * 32
    assert measure_codec("bf16", SHAPE, "fp32", repeats=1).nbytes == 2 * raw + HEADER
    plain, delta = (measure_codec(spec, SHAPE, "fp32", repeats=1) for spec in ("block:bits=2", "delta+block:bits=2"))
    assert delta.nbytes < 1.2 * plain.nbytes


def test_a_slow_link_asks_for_fewer_bytes_and_a_fast_one_for_none():
    slow = predict(cluster(SLOW, codecs=["identity", "bf16", "block:bits=4"]), measure=made_up)
    assert choose({p.label: p.seconds for p in slow}) == "block:bits=4"
    assert verdict(slow).startswith("Take block:bits=4: ") and "times as fast" in verdict(slow)
    fast = predict(cluster(FAST, codecs=["identity", "bf16", "block:bits=4"]), measure=made_up)
    assert choose({p.label: p.seconds for p in fast}) == "identity"
    assert verdict(fast).startswith("Do not compress: ")
    assert [p.nbytes for p in fast] == [(8 * 4096,) * 2, (8 * 2048,) * 2, (8 * 600,) * 2]
    assert all(p.limit <= p.seconds for p in slow + fast)


def test_a_little_slower_and_more_faithful_is_taken():
    assert choose({"none": 1.02, "block 8": 1.01, "block 4": 1.0}) == "none"
    assert choose({"none": 1.2, "block 8": 1.02, "block 4": 1.0}) == "block 8"
    assert choose({"none": 1.2, "block 8": 1.1, "block 4": 1.0}) == "block 4"


def test_a_slow_device_codes_slowly():
    one = predict(cluster(FAST, codecs=["block:bits=4"]), measure=made_up)[0]
    devices = [{"name": "a", "codec_speed": 0.01}, {"name": "b"}]
    two = predict(cluster(FAST, codecs=["block:bits=4"], devices=devices), measure=made_up)[0]
    coding = sum(e.end - e.start for e in two.timeline.events if e.kind in ("encode", "decode") and e.resource == 0)
    assert coding == pytest.approx(8 * 2 * 0.1)  # encodes activations, decodes gradients
    assert two.seconds > one.seconds + 1


def test_each_codec_is_measured_once_for_a_shape():
    asked = []

    def measure(*key):
        asked.append(key)
        return made_up(*key)

    stage = {"forward": "10ms", "activation": list(SHAPE)}
    many = parse_cluster({"microbatches": 64, "stages": [{"count": 64, **stage}], "links": {"bandwidth": SLOW}})
    assert len(predict(many, measure=measure)) == len(many.codecs)
    assert len(asked) == len(set(asked)) == len({spec for pair in many.codecs.values() for spec in pair})
