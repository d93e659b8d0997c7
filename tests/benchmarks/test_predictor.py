"""The predictor's statistics agree with what is known of them; its runs are as planned."""

import numpy as np
import pytest
from helpers.records import record
from scipy.stats import spearmanr


@pytest.fixture
def study():
    import predictor_study

    return predictor_study


def runs(count=40, noise=0.0, tasks=("cola", "sst2"), seed=0):
    """Runs of which "error" decides what is lost (rising), and "junk" does not."""
    generator = np.random.default_rng(seed)
    result = []
    for task in tasks:
        errors = generator.uniform(0, 1, count)
        for error in errors:
            lost = max(0.0, error - 0.5) + noise * generator.normal()
            result.append({"task": task, "codec": "x", "lost": float(lost), "error": float(error),
                           "good": float(-error), "junk": float(generator.normal()), "absent": None})  # fmt: skip
    return result


def test_spearman_is_that_of_scipy(study):
    generator = np.random.default_rng(0)
    for _ in range(5):
        x, y = generator.integers(0, 6, (2, 30))  # with ties
        assert study.spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert study.spearman([1, 1, 1, 1], [1, 2, 3, 4]) is None and study.spearman([1, 2], [1, 2]) is None


def test_the_quantity_that_decides_comes_first(study):
    result = study.study(runs(noise=0.02), draws=100)
    names = [row["quantity"] for row in result["quantities"]]
    assert set(names[:2]) == {"error", "good"} and "absent" not in names
    best = {row["quantity"]: row for row in result["quantities"]}
    assert best["error"]["rising"] and not best["good"]["rising"]
    low, high = best["error"]["interval"]
    assert 0.5 < low < best["error"]["rho"] < high < 1
    low, high = best["junk"]["interval"]
    assert low < 0 < high
    assert 0.55 < best["error"]["threshold"] < 0.66 and -0.66 < best["good"]["threshold"] < -0.55
    assert best["error"]["caught"] >= 0.9 * best["error"]["harmed"]
    assert best["error"]["false_alarms"] <= 0.1 * best["error"]["harmless"]


def test_what_few_runs_have_is_left_out(study):
    made = runs(20)
    for i, run in enumerate(made):
        run["rare"], run["half"] = (run["lost"] if i % 4 == 0 else None), (run["lost"] if i % 2 == 0 else None)
    names = [row["quantity"] for row in study.study(made, draws=10)["quantities"]]
    assert "half" in names and "rare" not in names


def test_levels_of_tasks_do_not_correlate(study):
    """A quantity that is larger in the task that loses more, and says nothing within a task, gets no credit."""
    made = runs(30)
    for run in made:
        run["level"] = run["junk"] + (100 if run["task"] == "cola" else 0)
        run["lost"] += 10 * (run["task"] == "cola")
    assert abs(study.within_tasks(made, "level")) < 0.3
    assert study.spearman([run["level"] for run in made], [run["lost"] for run in made]) > 0.7


def test_the_task_left_out_has_no_say(study):
    made = runs(30)
    before = study.left_out(made, "error", True)
    for run in made:
        if run["task"] == "cola":
            run["lost"] = 1 - run["lost"]
    after = study.left_out(made, "error", True)
    assert before[0]["threshold"] == after[0]["threshold"] and before[0]["right"] != after[0]["right"]
    assert before[1]["threshold"] != after[1]["threshold"]


def test_what_is_lost_and_the_quantities_of_whole_trainings(study):
    made = study.long_runs([record(seed=0, plain=0.909), record("sort:bits=8", 0, 0.9, 0.809), record(task="rte")])
    assert len(made) == 1
    assert made[0]["lost"] == pytest.approx(0.1 / 0.4)
    assert made[0]["rel_error, forward, whole run"] == pytest.approx(0.2)
    assert made[0]["compression ratio"] == pytest.approx(2000 / 750) and made[0]["early loss - none's"] == 0


def test_beginnings_go_to_all_seeds_of_their_codecs(study):
    row = {"site": "parameters", "layer": None, "direction": "gradient", "cosine": 0.7, "rel_error": 0.6,
           "loss": 2.0, "plain_loss": 1.5}  # fmt: skip
    beginning = {"task": "sst2", "codec": "sort:bits=8", "grad_codec": None, "early": [row]}
    runs = [record(seed=0), *(record("sort:bits=8", seed, 0.9, 0.8) for seed in (0, 1)),
            record("sort:bits=8", 0, 0.9, 0.8, grad_codec="identity")]  # fmt: skip
    made = study.long_runs(runs, [beginning])
    assert [run["cosine, parameter gradient"] for run in made] == [0.7, 0.7, None]


def test_early_quantities_are_those_of_the_worst_boundary(study):
    names = ("rel_error", "cosine", "effective_bits", "zeroed", "saturated", "outlier", "kurtosis", "bias")
    row = {"site": "boundary", "direction": "forward", "layer": 0, "name": "a", **dict.fromkeys(names, 0.5)}
    total = {"site": "parameters", "layer": None, "direction": "gradient", "cosine": 0.7, "rel_error": 0.6,
             "loss": 2.0, "plain_loss": 1.5}  # fmt: skip
    rows = [row, {**row, "layer": 3, "rel_error": 0.9, "cosine": 0.1, "bias": -4.0, "kurtosis": None}, total,
            {**total, "layer": 2, "cosine": 0.3}]  # fmt: skip
    found = study._early(rows)
    assert (found["rel_error, forward"], found["cosine, forward"], found["|bias|, forward"]) == (0.9, 0.1, 4.0)
    assert found["kurtosis, forward"] == 0.5 and found["rel_error, backward"] is None
    assert (found["cosine, parameter gradient"], found["cosine, worst layer's gradient"]) == (0.7, 0.3)
    assert found["loss - plain loss"] == 0.5


def test_runs_are_planned_once_and_cover_the_tasks():
    import predictor

    planned = predictor.plan(list(predictor.TASKS))
    assert len({run.path for run in planned}) == len(planned)
    compressed = [run for run in planned if run.codec != "none"]
    assert len(compressed) >= 60 and {run.task for run in planned} == {"cola", "sst2", "cifar10", "mnist"}


def test_records_are_averaged_by_place():
    import predictor

    row = {"site": "boundary", "layer": 0, "name": "a", "direction": "forward", "model": "m", "step": 0, "epoch": 0,
           "codec": "c", "call": 0, "rel_error": 0.2, "snr_db": None}  # fmt: skip
    made = predictor.early_rows([row, {**row, "step": 5, "rel_error": 0.4}, {**row, "layer": 1, "snr_db": 3.0}])
    assert made[0] == {"site": "boundary", "layer": 0, "name": "a", "direction": "forward", "samples": 2,
                       "rel_error": pytest.approx(0.3), "snr_db": None}  # fmt: skip
    assert made[1]["snr_db"] == 3.0
