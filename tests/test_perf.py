"""The benchmarks' own arithmetic and bookkeeping. Nothing is timed here."""

from __future__ import annotations

import json

import numpy as np
import pytest

from perf import goals, harness, report
from perf.competitors import BARE_PARALLEL, COMPETITORS, TRAINER
from perf.workloads import SECTIONS, WORKLOADS, arrays, touched


def results(seconds=lambda name: 1.0, rounds=3):
    """Every competitor in every workload of its kinds, with made-up times."""
    found = {}
    for workload in WORKLOADS:
        names = [c.name for c in COMPETITORS if workload.kind in c.ways]
        samples = {name: [seconds(name) * (1 + k) for k in range(rounds)] for name in names}
        found[workload.name] = harness.Result(workload, samples, {})
    return found


def file(found):
    """What a run with these results writes."""
    run = {"runs": {}, "results": {name: result.plain() for name, result in found.items()}}
    report.describe(run, list(SECTIONS), 2, {"torch": "2"}, {"MXNet": "not here"})
    return run


def workload(name):
    return next(workload for workload in WORKLOADS if workload.name == name)


def test_workloads_have_names_of_their_own_and_known_sections():
    assert len({workload.name for workload in WORKLOADS}) == len(WORKLOADS)
    assert {workload.section for workload in WORKLOADS} == set(SECTIONS)
    assert {w.section for w in WORKLOADS if w.quick} == set(SECTIONS) - {"threads"}


@pytest.mark.parametrize(
    ("name", "per_element"),
    [
        ("dense/nag/10M", 20),  # gradient read, weight and momentum read and written
        ("dense/ftml/10M", 36),
        ("dense/ftml/10M/float64", 72),
        ("dense/adamax/10M/bfloat16", 14),
        ("dense/nag/10M/float16+master", 2 + 8 + 8 + 2),
        ("clip/nag/10M", 24),
        ("checkpoint/nag/save", 8),
    ],
)
def test_bytes_that_must_be_moved(name, per_element):
    assert workload(name).bytes == per_element * workload(name).elements


def test_bytes_of_rows_are_those_of_touched_ones():
    assert workload("rows/groupadagrad/31250 of 312500 x 64").bytes == 31_250 * (64 * 12 + 8 + 8)
    zipf = workload("rows/groupadagrad/50000 x 64, 200000 by Zipf")
    assert zipf.bytes == 200_000 * (64 * 4 + 8) + 50_000 * (64 * 8 + 8)


def test_arrays_are_the_same_for_everybody():
    some = workload("many/nag/200 x 256")
    for column, again in zip(arrays(some), arrays(some), strict=True):
        assert [a.shape for a in column] == list(some.shapes)
        np.testing.assert_array_equal(column, again)
    assert not np.array_equal(*[column[0] for column in arrays(some)])


@pytest.mark.parametrize("some", [w for w in WORKLOADS if w.rows], ids=lambda w: w.name)
def test_rows_are_as_many_as_asked_for(some):
    grads = touched(some)
    assert len(grads) == some.rows.turns
    seen = np.concatenate([numbers for numbers, _ in grads])
    assert len(np.unique(seen)) == some.rows.count * some.rows.turns
    assert len(seen) == (some.rows.occurrences or some.rows.count * some.rows.turns)
    assert 0 <= seen.min() <= seen.max() < some.shapes[0][0]
    assert all(values.shape == (len(numbers), some.shapes[0][1]) for numbers, values in grads)


def test_every_goal_speaks_of_workloads_and_competitors_that_exist():
    judged = goals.judge(results())
    assert len(judged) == len(goals.GOALS)
    assert all(row["met"] is not None for row in judged)


def test_every_goal_can_be_met_and_missed():
    """By times that are all the same, or anything."""
    rng = np.random.default_rng(0)
    runs = [results(), *(results(lambda name: rng.lognormal(0, 5)) for _ in range(30))]
    for goal in goals.GOALS:
        measured = [goal.measure(run)[0] for run in runs]
        assert {goal.met(value) for value in measured} == {True, False}, goal.text


def test_missed_goals_come_first_and_those_of_absent_competitors_last():
    found = results(lambda name: 2.0 if name == TRAINER else 1.0)
    for result in found.values():
        result.samples.pop("MXNet", None)
    met = [row["met"] for row in goals.judge(found)]
    assert met == sorted(met, key=[False, True, None].index)
    assert {False, True, None} == set(met)


def test_ratios_are_taken_within_a_round():
    samples = {"a": [1.0, 10.0, 2.0], "b": [2.0, 20.0, 2.0], BARE_PARALLEL: [1.0, 5.0, 1.0]}
    result = harness.Result(workload("dense/nag/10M"), samples, {})
    assert result.ratio("a", "b") == 2
    assert result.best("a", "b") == 2
    assert result.of_bare("a") == 0.5
    assert result.speed("a") == result.workload.bytes / 2 / 1e9


def test_a_file_gives_back_what_was_measured(tmp_path):
    path = tmp_path / "machine.json"
    report.write(path, file(results(lambda name: 0.123)))
    again = report.results(report.read(path))
    for name, result in results(lambda name: 0.123).items():
        assert again[name].samples.keys() == result.samples.keys()
        for competitor, seconds in result.samples.items():
            assert again[name].samples[competitor] == pytest.approx(seconds)
    assert report.read(tmp_path / "none.json")["results"] == {}
    assert len(path.read_text().splitlines()) < 4 * sum(len(r.samples) for r in again.values())


def test_the_readme_changes_between_its_marks_alone(tmp_path):
    readme, path = tmp_path / "README.md", tmp_path / "results" / "machine.json"
    readme.write_text(f"before\n{report.BEGIN}\nyesterday\n{report.END}\nafter\n")
    seen = []
    for seconds in (1.0, 1.0, 1.5):
        found = file(results(lambda name, seconds=seconds: seconds))
        report.into_readme(readme, found, path, [("a picture", path.with_suffix(".svg"))])
        text = readme.read_text()
        assert text.startswith(f"before\n{report.BEGIN}\n")
        assert text.endswith(f"\n{report.END}\nafter\n")
        assert "yesterday" not in text
        assert report.time(2 * seconds) in text  # the median of a competitor's samples
        assert "](results/machine.svg)" in text
        seen.append(text)
    assert seen[0] == seen[1] != seen[2]
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="perf: begin"):
        report.into_readme(readme, file(results()), path, [])


def test_the_report_has_what_was_measured_and_nothing_else():
    found = results(lambda name: 0.123)
    gone = WORKLOADS[::7]
    for some in gone:
        del found[some.name]
    text = report.markdown(file(found))
    for label in map(report.label, WORKLOADS):
        measured = [some for some in WORKLOADS if some not in gone and report.label(some) == label]
        assert text.count(f"**{label}**") == len(measured)
    assert report.time(2 * 0.123) in text
    assert all(text.count(goal.text) for goal in goals.GOALS)
    assert "MXNet (not here)" in text


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from perf import pictures

    drawn = pictures.draw(file(results()), tmp_path / "machine")
    assert [path.name for _, path in drawn] == [f"machine-{name}.svg" for name in ("dense", "many", "rows")]
    assert all(path.read_text().lstrip().startswith("<?xml") for _, path in drawn)


def test_a_competitor_that_fails_does_not_end_the_run(monkeypatch):
    monkeypatch.setattr(harness, "set_threads", lambda threads: None)

    def fails(workload):
        raise ValueError("not today")

    def call(repeats, warm):
        return 0.1

    competitors = [
        COMPETITORS[0]._replace(name="fails", ways={"step": fails}),
        COMPETITORS[0]._replace(name="works", ways={"step": lambda workload: call}),
        COMPETITORS[0]._replace(name="declines", ways={"step": lambda workload: None}),
        COMPETITORS[0]._replace(name="elsewhere", ways={"rows": fails}),
    ]
    some = workload("dense/nag/2^8")._replace(threads=1)
    result = harness.measure(some, competitors, harness.Effort(0.0, 3, 5))
    assert result.samples == {"works": [0.1] * 3}
    assert result.failed == {"fails": "ValueError: not today"}
    assert json.loads(json.dumps(result.plain()))["failed"] == result.failed


def test_rounds_end_in_bounded_time():
    effort = harness.Effort(2.0, 5, 25)
    assert not effort.spent(4, 10.0)
    assert not effort.spent(5, 1.0)
    assert effort.spent(5, 2.0)
    assert effort.spent(25, 0.1)
    assert effort.spent(1, harness.PATIENCE + 1)
    assert not effort.spent(0, harness.PATIENCE + 1)
