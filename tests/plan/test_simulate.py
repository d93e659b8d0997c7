"""The simulator against closed forms, and against a twin that a reader believes at sight."""

import random
from itertools import pairwise

import pytest

from hf_actcompress.plan.schedules import SCHEDULES, Action, orders, place
from hf_actcompress.plan.simulate import Cut, Link, Stage, Traffic, bound, simulate
from hf_actcompress.plan.timeline import chart, rows, text

FREE = Link(1e30)


def chain(count, link=FREE):
    return {(k, k + 1): link for k in range(count - 1)}


def cuts(count, *numbers):
    traffic = Traffic(*(numbers or (0,)))
    return [Cut(traffic, traffic)] * (count - 1)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "early-1f1b"])
@pytest.mark.parametrize(("stages", "chunks"), [(1, 3), (2, 8), (4, 8), (3, 3)])
def test_the_bubble_over_free_links(schedule, stages, chunks):
    found = simulate([Stage(1, 2)] * stages, chain(stages), cuts(stages), chunks, schedule)
    assert found.seconds == pytest.approx((chunks + stages - 1) * 3)
    assert found.bubble == pytest.approx((stages - 1) / (chunks + stages - 1))


def test_interleaving_divides_the_bubble():
    """v stages on each of p devices: (p - 1) / v of a micro-batch's time is lost instead of p - 1."""
    whole = simulate([Stage(2, 4)] * 4, chain(4), cuts(4), 8, "1f1b")
    links = {**chain(4), (0, 3): FREE}
    halves = simulate([Stage(1, 2)] * 8, links, cuts(8), 8, "interleaved", devices=4)
    assert whole.seconds == pytest.approx(8 * 6 + 3 * 6)
    assert halves.seconds == pytest.approx(8 * 6 + 3 * 3)


def test_zero_bubble_has_none_where_its_three_parts_are_alike():
    found = simulate([Stage(1, 2)] * 8, chain(4), cuts(8), 16, "zbv", devices=4)
    assert all(found.busy(device) * found.seconds == pytest.approx(16 * 6) for device in range(4))
    assert found.seconds == pytest.approx(16 * 6 + 3, rel=0.01)  # the last device begins 3 late, none waits after


@pytest.mark.parametrize("schedule", ["gpipe", "early-1f1b"])
def test_a_slow_link_is_bytes_over_bandwidth(schedule):
    nbytes, bandwidth, chunks = 1000, 10, 16
    found = simulate([Stage(0, 0)] * 2, chain(2, Link(bandwidth)), cuts(2, nbytes), chunks, schedule)
    one_way = chunks * nbytes / bandwidth
    if schedule == "gpipe":  # forward, then back
        assert found.seconds == pytest.approx(2 * one_way)
    else:  # both ways at once, but for the first there and the last back
        assert found.seconds == pytest.approx(one_way + nbytes / bandwidth)
    assert found.busy((0, 1)) == pytest.approx(one_way / found.seconds)


def test_early_forwards_hide_a_link_as_slow_as_the_computation():
    slow = chain(2, Link(1 / 3)), cuts(2, 1), 32  # three seconds a message, as a forward and a backward take
    waits, early = (simulate([Stage(1, 2)] * 2, *slow, schedule).seconds for schedule in ("1f1b", "early-1f1b"))
    least = bound([Stage(1, 2)] * 2, *slow, "early-1f1b")
    assert least == 96
    assert early < 1.12 * least < 1.8 * least < waits


def test_latency_and_codecs_count():
    # The first device hears after 5 that the second is ready: link 2 + latency 5, decode .2, F 1 B 2, encode .1, link
    # 2 + 5, decode .2, B 2, optimizer .5
    cut = [Cut(Traffic(20, 0.1, 0.2), Traffic(20, 0.1, 0.2))]
    found = simulate([Stage(1, 2, 0.5), Stage(1, 2)], chain(2, Link(10, 5)), cut, 1, "gpipe")
    assert found.seconds == pytest.approx(5 + 7 + 0.2 + 3 + 0.1 + 7 + 0.2 + 2 + 0.5)


@pytest.mark.parametrize("quick", [0, 1])
def test_torch_uses_one_direction_at_a_time(quick):
    """What asks for the next activation waits behind the gradient that goes the same way, or the other way round."""
    one_way, stages = 16 * 1000 / 10, [Stage(0.02, 0.02), Stage(0.03, 0.03)][:: 1 if quick else -1]
    waits = simulate(stages, chain(2, Link(10)), cuts(2, 1000), 16, "1f1b")
    early = simulate(stages, chain(2, Link(10)), cuts(2, 1000), 16, "early-1f1b")
    assert waits.seconds == pytest.approx(2 * one_way, rel=0.05)
    assert early.seconds == pytest.approx(one_way * 17 / 16, rel=0.01)


def test_stages_of_one_device_hand_over_for_nothing():
    """The client has the first and the last stage: only two of three cuts are on a link, and these share it."""
    cut = [Cut(Traffic(10, 0.5, 0.5), Traffic(10, 0.5, 0.5))] * 3
    found = simulate([Stage(1, 2)] * 4, chain(2, Link(10)), cut, 4, "zbv", devices=2)
    sends = [e for e in found.events if e.kind == "send"]
    assert len(sends) == 4 * 2 * 2
    for way in ((0, 1), (1, 0)):
        spans = sorted((e.start, e.end) for e in sends if e.resource == way)
        assert all(b[0] >= a[1] - 1e-9 for a, b in pairwise(spans))
    for kind in ("encode", "decode"):
        assert sum(e.kind == kind for e in found.events) == len(sends)


def slow_twin(stages, link, cut, chunks, order):
    """Times by recursion: when does this end?  One stage per device, prompt receives, sends that do not wait."""
    ends = {}
    last = len(stages) - 1

    def before(stage, action):
        return order[stage][order[stage].index(action) - 1] if order[stage].index(action) else None

    def arrives(kind, stage, chunk):
        other = stage - 1 if kind == "F" else stage + 1
        traffic = cut[min(stage, other)].forward if kind == "F" else cut[min(stage, other)].backward
        return leaves(kind, stage, chunk) + link.latency, traffic

    def leaves(kind, stage, chunk):
        """When the message for `stage` has left; micro-batches follow each other on the link."""
        key = ("left", kind, stage, chunk)
        if key not in ends:
            other = stage - 1 if kind == "F" else stage + 1
            traffic = cut[min(stage, other)].forward if kind == "F" else cut[min(stage, other)].backward
            start = end(kind, other, chunk)
            if chunk:
                start = max(start, leaves(kind, stage, chunk - 1))
            ends[key] = start + traffic.nbytes / link.bandwidth
        return ends[key]

    def end(kind, stage, chunk):
        key = (kind, stage, chunk)
        if key not in ends:
            action = next(a for a in order[stage] if (a.kind, a.chunk) == (kind, chunk))
            previous = before(stage, action)
            start = end(previous.kind, stage, previous.chunk) if previous else 0.0
            if (kind == "F" and stage > 0) or (kind == "B" and stage < last):
                there, traffic = arrives(kind, stage, chunk)
                start = max(start, there) + traffic.decode
            start += stages[stage].forward if kind == "F" else stages[stage].backward
            if kind == "F" and stage < last:
                start += cut[stage].forward.encode
            if kind == "B" and stage > 0:
                start += cut[stage - 1].backward.encode
            ends[key] = start
        return ends[key]

    return max(end("B", stage, chunks - 1) + stages[stage].optimizer for stage in range(len(stages)))


@pytest.mark.parametrize("seed", range(40))
def test_the_twin_agrees(seed):
    draw = random.Random(seed)
    count = draw.randint(1, 5)
    chunks = count + draw.randint(0, 6)
    stages = [Stage(draw.random(), 2 * draw.random(), draw.random()) for _ in range(count)]

    def traffic():
        return Traffic(draw.random(), draw.random() / 9, draw.random() / 9)

    cut = [Cut(traffic(), traffic()) for _ in range(count - 1)]
    link, ahead = Link(draw.choice([0.3, 1, 100]), draw.choice([0, 0.7])), draw.randint(0, 3)
    order = orders("early-1f1b", count, count, chunks, ahead)
    found = simulate(stages, chain(count, link), cut, chunks, ahead=ahead)
    assert found.seconds == pytest.approx(slow_twin(stages, link, cut, chunks, order))
    assert found.seconds >= bound(stages, chain(count, link), cut, chunks, "early-1f1b") - 1e-9


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_nothing_is_lost_or_done_twice(schedule):
    devices = 3
    stages = devices * {"interleaved": 2, "zbv": 2}.get(schedule, 1)
    links = {(0, 1): Link(3), (1, 2): Link(2), (0, 2): Link(4)}
    found = simulate([Stage(1, 2)] * stages, links, cuts(stages, 2, 0.1, 0.1), 6, schedule, devices=devices)
    for resource in [*range(devices), *found.links]:
        spans = sorted((e.start, e.end) for e in found.events if e.resource == resource)
        assert all(b[0] >= a[1] - 1e-9 for a, b in pairwise(spans)), "one thing at a time"
    at = place(schedule, stages, devices)
    for stage in range(stages):
        for kinds in (("F",), ("B", "W"), ("B", "I")):
            chunks = [e.chunk for e in found.events if e.stage == stage and e.kind in kinds]
            assert sorted(chunks) == list(range(6))
        assert {e.resource for e in found.events if e.stage == stage and e.kind == "F"} == {at[stage]}
    remote = sum(a != b for a, b in pairwise(at))
    assert sum(e.kind == "send" for e in found.events) == 6 * 2 * remote


def test_early_forwards_go_by_the_links_that_are_ahead():
    first, middle, last = orders("early-1f1b", 3, 3, 9, ahead=2)
    begun = [next(k for k, a in enumerate(order) if a.kind == "B") for order in (first, middle, last)]
    assert begun == [7, 4, 1]
    assert orders("early-1f1b", 3, 3, 9, ahead=0) == [
        [Action(a.kind, a.stage, a.chunk) for a in order] for order in orders("1f1b", 3, 3, 9)
    ]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), [
    (("2f2b", 2, 2, 4), "Unknown schedule '2f2b'. Schedules: early-1f1b, 1f1b"),
    (("1f1b", 4, 2, 4), "'1f1b' needs as many stages as devices; there are 4 stages on 2 devices"),
    (("zbv", 2, 2, 4), "'zbv' needs two stages per device"),
    (("interleaved", 2, 2, 4), "needs twice, three times, ... as many"),
    (("interleaved", 4, 2, 5), "5 micro-batches are not a multiple of their 2 rounds"),
    (("1f1b", 4, 4, 3), "3 micro-batches; at least 4 are needed"),
])  # fmt: skip
def test_what_a_schedule_cannot_have(arguments, message):
    with pytest.raises(ValueError) as error:
        orders(*arguments)
    assert message in str(error.value)


def test_what_a_step_cannot_have():
    with pytest.raises(ValueError, match="2 stages have 1 cuts between them; got 0"):
        simulate([Stage(1, 2)] * 2, chain(2), [], 4)
    with pytest.raises(ValueError, match="No link between devices 1 and 2"):
        simulate([Stage(1, 2)] * 3, chain(2), cuts(3), 4)


# to look at


def test_the_text_shows_who_works_when():
    found = simulate([Stage(1, 2)] * 2, chain(2, Link(1)), cuts(2, 1), 2)
    lines = {label: "".join(piece for piece, _ in pieces) for label, pieces in text(found, ["a", "b"], 11)}
    assert found.seconds == 11
    assert lines == {"a": "FF....BB.BB", "  a > b": ".==........", "  b > a": ".....=..=..", "b": "..FBBFBB..."}


def test_a_large_cluster_is_shown_in_part(tmp_path):
    count = 64
    found = simulate([Stage(1, 2)] * count, chain(count, Link(10, 0.1)), cuts(count, 1), count)
    names = [f"host {k}" for k in range(count)]
    labels = [label for label, resource in rows(found, names) if isinstance(resource, int)]
    assert labels == names[:3] + names[-3:]
    assert chart([("x", found)], names, tmp_path / "new" / "x.png").stat().st_size > 5000


def test_who_waits_for_its_sends_in_1f1b():
    """As torch's Schedule1F1B: the sends of the warm-up run on but for its last one, those of the steady phase are
    waited for together with the next receive, and the cool-down has nothing to wait for."""
    found = [(a.kind, a.chunk, a.blocking) for a in orders("1f1b", 2, 2, 4)[0]]
    assert found == [
        ("F", 0, False), ("F", 1, True), ("B", 0, True), ("F", 2, True), ("B", 1, True), ("F", 3, True),
        ("B", 2, False), ("B", 3, False),
    ]  # fmt: skip
    assert not any(a.blocking for rank in orders("early-1f1b", 2, 2, 4) for a in rank)
