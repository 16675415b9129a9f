import csv
import io
import json

import markupsafe
import numpy as np
import pytest

from attribution import ForgetSet
from attribution.counterfactual import Prediction
from attribution.prediction_files import write_prediction
from attribution.purging.files import leftovers, loose_files, telling_files
from attribution.purging.tombstones import FILE, Tombstones, read_tombstones, write_tombstones
from stores import Provenance, Store, StoreSpec, place
from stores.schema import ArraySpec

ROW = 'Zoë "Z" <1>'


@pytest.fixture
def run(tmp_path):
    spec = StoreSpec("prediction", "target", 1, {"mean": ArraySpec(("target",), (1,), "float32")})
    Store.create(tmp_path / "in/store", spec, Provenance({}), ids={"target": ["row-1"]})
    return place(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "row-1",
        '{"row": "row-1"}',
        "a,row-1,2\n",
        "<td>row-1</td>",
        "first row-10 and then row-1",
        "/row-1/",
    ],
)
def test_a_file_that_names_a_row_is_found(run, text):
    run.write("deep/file.txt", text.encode())
    assert telling_files(run, ["row-1", "row-2"]) == ["deep/file.txt"]


@pytest.mark.parametrize("text", ["row-10", "arow-1", "row-1a", "row 1", ""])
def test_a_file_that_names_another_row_is_not(run, text):
    run.write("file.txt", text.encode())
    assert telling_files(run, ["row-1", "row-2"]) == []


def table(*rows):
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        ROW,
        json.dumps(ROW),
        json.dumps(ROW, ensure_ascii=False),
        "Zoë &quot;Z&quot; &lt;1&gt;",
        markupsafe.Markup("<td>{}</td>").format(ROW),
        table(["row", "value"], [ROW, 1.5]),
    ],
)
def test_ids_are_found_as_json_html_and_tables_spell_them(run, text):
    run.write("file", text.encode())
    assert telling_files(run, [ROW]) == ["file"]


def test_an_apostrophe_is_found_as_pages_spell_it(run):
    run.write("page.html", markupsafe.escape("of O'Neill").encode())
    assert telling_files(run, ["O'Neill"]) == ["page.html"]


def test_what_is_measured_before_goes_and_what_names_no_row_stays(run):
    measured = ["evaluation.json", "evaluation.previous.json", "report.html", "tuned.json"]
    for name in (*measured, "in/report.html"):
        run.write(name, b"{}")
    for name in ("run.json", "calibration.json", FILE, "model.safetensors", "old.pt"):
        run.write(name, b"row-1")
    assert telling_files(run, ["row-1"]) == measured
    assert loose_files(run) == sorted([*measured, "in/report.html"])


def test_a_table_of_predictions_goes_whatever_it_names(run):
    prediction = Prediction(("row-9",), *np.zeros((4, 1, 2), np.float32))
    forget = ForgetSet("row-1", ("row-1",), (0,), 3)
    write_prediction(prediction, f"{run}/some.csv", forget)
    run.write("other.csv", b"target,mean\r\nrow-9,1\r\n")
    assert telling_files(run, ["row-1"]) == ["some.csv"]
    assert loose_files(run) == ["other.csv", "some.csv"]


def test_leftovers_of_killed_writers_are_found(run):
    spec = StoreSpec("prediction", "target", 1, {"mean": ArraySpec(("target",), (1,), "float32")})
    Store.create(run / "other", spec, Provenance({}), ids={"target": ["row-1"]})
    run.remove("other/zarr.json")  # as a creation in a bucket looks that was killed
    run.write("in/a.01.tmp/mask/zarr.json", b"row-1")
    run.write("in/store/mean/c/0.02.partial", b"")
    run.write("b.03.partial", b"row-1")
    folders, files = leftovers(run)
    assert folders == ["in/a.01.tmp", "other/done", "other/mean", "other/target_id"]
    assert files == ["b.03.partial", "in/store/mean/c/0.02.partial"]
    assert telling_files(run, ["row-1"]) == []


def test_tombstones_know_rows_by_their_digests_alone(run):
    stones = read_tombstones(run).adding(["row-1", "row-2"])
    write_tombstones(run, stones)
    assert b"row" not in run.read(FILE)
    assert read_tombstones(run) == stones
    assert stones.matching(["row-3", "row-2", "row-1"]) == [1, 2]
    assert not set(stones.digests) & set(Tombstones.drawn().adding(["row-1", "row-2"]).digests)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"schema": 9, "salt": "", "digests": []}']
)
def test_spoiled_tombstones_are_refused(run, content):
    run.write(FILE, content)
    with pytest.raises(ValueError, match=r"cannot read the tombstones in '.*tombstones\.json'"):
        read_tombstones(run)
