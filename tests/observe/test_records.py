"""Record files: read by others as they are, and refused where they are not what they should be."""

import json

import pytest

from hf_actcompress.observe.records import COLUMNS, FILE_NAME, Writer, read_records, row


def rows(*steps, model="A-1"):
    return [row(model=model, step=step, site="boundary", rel_error=0.5, layer=layer) for step in steps
            for layer in (0, None)]  # fmt: skip


def written(folder, *steps):
    Writer(folder / FILE_NAME, "A-1")(rows(*steps))
    return folder / FILE_NAME


def test_what_is_written_is_read(tmp_path):
    path = written(tmp_path, 0, 100)
    assert read_records(path) == read_records(tmp_path) == rows(0, 100)
    assert list(read_records(path)[0]) == list(COLUMNS)


def test_pandas_and_datasets_read_it(tmp_path):
    path = written(tmp_path, 0, 100)
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    frame = pandas.read_json(path, lines=True)
    assert list(frame.columns) == list(COLUMNS) and list(frame["step"]) == [0, 0, 100, 100]
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["rel_error"][:] == [0.5] * 4


def test_numbers_are_short_and_json(tmp_path):
    values = row(rel_error=1 / 3, snr_db=float("inf"), cosine=float("nan"), numel=12345678)
    assert (values["rel_error"], values["snr_db"], values["cosine"]) == (0.333333, None, None)
    assert values["numel"] == 12345678
    with pytest.raises(AssertionError):
        row(relative=1)


def test_a_new_run_starts_a_new_file_and_a_resumed_one_goes_on(tmp_path):
    path = written(tmp_path, 0, 100, 200)
    Writer(path, "A-1", resume_at=150)(rows(200, 300))
    assert [r["step"] for r in read_records(path)][::2] == [0, 100, 200, 300]
    written(tmp_path, 0)
    assert [r["step"] for r in read_records(path)] == [0, 0]


def test_resuming_after_a_crash_drops_half_a_line(tmp_path):
    path = written(tmp_path, 0, 100)
    path.write_text(path.read_text()[:-40])
    Writer(path, "A-1", resume_at=200)(rows(200))
    assert [r["step"] for r in read_records(path)] == [0, 0, 100, 200, 200]


def test_resuming_into_the_file_of_another_model_is_refused_and_keeps_it(tmp_path):
    path = written(tmp_path, 0, 100)
    before = path.read_text()
    with pytest.raises(ValueError, match="holds records of 'A-1', and this run trains 'B-2'.*another output_dir"):
        Writer(path, "B-2", resume_at=100)
    assert path.read_text() == before


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="no records at .*analysis=True"):
        read_records(tmp_path)
    path = tmp_path / FILE_NAME
    path.write_text("\n")
    with pytest.raises(ValueError, match="is empty.*analysis_every"):
        read_records(path)
    written(tmp_path, 0)
    path.write_text(path.read_text()[:-30])
    with pytest.raises(ValueError, match="line 2 of 2 is not JSON.*cut short there: delete that line"):
        read_records(path)
    lines = [json.dumps(r) for r in rows(0)]
    path.write_text("\n".join([lines[0][:-9], lines[1]]))
    with pytest.raises(ValueError, match="line 1 of 2 is not JSON") as error:
        read_records(path)
    assert "delete" not in str(error.value)
    path.write_text("\n".join(json.dumps(r) for r in rows(0) + rows(1, model="B-2")))
    with pytest.raises(ValueError, match=r"mixes records of 2 models \(A-1, B-2\)"):
        read_records(path)
    short = {k: v for k, v in rows(0)[0].items() if k not in ("bias", "step")}
    for text in (json.dumps(short), "[1, 2]"):
        path.write_text(text)
        with pytest.raises(ValueError, match="line 1 lacks .*step.*bias"):
            read_records(path)
