import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.small_runs import CHECKPOINTS, PLAIN, SIZES, arrays, contents
from unlearning.cli import main

FEW = ("--forget", "few=rows:3:8")


# -- stores: found, made pending, computed again -------------------------------------------------


STORES = [
    ("full", "outputs", 1),
    ("full", "weights_0", 0),
    ("ensemble-mixed-24", "outputs", 0),
    ("datamodel-mixed-24", "own", 0),
    ("moments", "accuracy", 2),
    (f"trak-{CHECKPOINTS}/scores", "effects", 0),
]


def flip_a_byte(run, store, array, block):
    folder = run / store / array / "c"
    files = [path for path in folder.rglob("*") if path.is_file()]
    (chunk,) = [path for path in files if path.relative_to(folder).parts[0] == str(block)]
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)


@pytest.mark.parametrize("place", STORES, ids=lambda place: "-".join(map(str, place)))
def test_a_flipped_byte_is_found_discarded_and_computed_again(copy, capsys, place):
    store, _, block = place
    words = ["status", "--run", str(copy)]
    sound = arrays(copy)
    flip_a_byte(copy, *place)
    assert main(words) == 0
    capsys.readouterr()
    assert main([*words, "--verify"]) == 1
    assert capsys.readouterr() == (
        "",
        f"dmm: damaged: {store} blocks [{block}]; dmm status --run {copy} --discard makes these"
        " blocks pending, and the command that made them computes them again\n",
    )
    assert main([*words, "--discard", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    pending = {row["store"]: (row["pending"], row["bad"]) for row in json.loads(out)["stores"]}
    assert {name for name, found in pending.items() if found != (0, [])} == {store}
    assert pending[store] == (1, [block])
    assert main(["precompute", f"{copy.parent}/small.py:task", "--run", str(copy), *SIZES]) == 0
    capsys.readouterr()
    assert main([*words, "--verify"]) == 0
    assert capsys.readouterr().out.endswith("all checksums hold\n")
    assert arrays(copy) == sound


def test_a_truncated_file_is_cured_by_what_its_refusal_says(refused, dmm, run, plain_copy):
    predict = ["predict", *FEW, "--predictor", "datamodel", "--run"]
    folder = plain_copy / "datamodel-mixed-24" / "effects" / "c"
    for chunk in (path for path in folder.rglob("*") if path.is_file()):
        chunk.write_bytes(chunk.read_bytes()[:500])
    told = refused(*predict, plain_copy)
    assert f" in {folder}/" in told
    assert told.endswith(
        "; dmm status --verify (verify()) finds damaged blocks, --discard (discard()) makes them"
        " pending, and what made them makes them again"
    )
    dmm("status", "--run", plain_copy, "--discard")
    dmm("precompute", f"{plain_copy.parent}/small.py:task", "--run", plain_copy, *PLAIN)
    assert dmm(*predict, plain_copy) == dmm(*predict, run)


@pytest.mark.parametrize("lost", ["full/mask/c/0/0", "full/target_id/c/0"])
@pytest.mark.parametrize("spoil", [lambda f: f.unlink(), lambda f: f.write_bytes(flipped(f))])
def test_a_damaged_constant_is_named_and_nothing_is_purged(plain_copy, capsys, lost, spoil):
    spoil(plain_copy / lost)
    capsys.readouterr()
    for words in (["status", "--verify"], ["purge", *FEW]):
        assert main([words[0], "--run", str(plain_copy), *words[1:]]) != 0
        out, err = capsys.readouterr()
        assert out == ""
        assert "/".join(lost.split("/")[:2]) in err
        assert "restore" in err


ROOTS = {
    "gone": ("full", lambda file: file.unlink()),
    "half": ("moments", lambda file: file.write_bytes(file.read_bytes()[:20])),
    "other": ("datamodel-mixed-24", lambda file: file.write_text("[]")),
    "behind": ("calibration/bank", lambda file: file.unlink()),
}


@pytest.mark.parametrize(("store", "spoil"), ROOTS.values(), ids=ROOTS)
def test_a_store_without_its_root_is_named_and_nothing_is_purged(copy, capsys, store, spoil):
    spoil(copy / store / "zarr.json")
    before = contents(copy)
    for words in (["status"], ["status", "--verify"], ["purge", *FEW]):
        capsys.readouterr()
        assert main([words[0], "--run", str(copy), *words[1:]]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"dmm: damaged: {copy}/{store}/zarr.json; ")
        assert "restore" in err
    assert contents(copy) == before


def test_a_half_written_root_is_named_by_what_reads_it(copy, refused):
    root = copy / "datamodel-mixed-24" / "zarr.json"
    root.write_bytes(root.read_bytes()[:50])
    told = refused("predict", "--run", copy, *FEW, "--predictor", "datamodel")
    assert told.startswith(f"{root} is damaged; restore it from a copy, or remove {root.parent} ")


@pytest.mark.parametrize("link", ["oracles", "full/outputs/c/0", "full/mask/c/0/0", "dangling"])
def test_what_a_symbolic_link_leads_to_is_not_passed_over(copy, tmp_path, capsys, link):
    if link != "dangling":
        (copy / "oracles").mkdir(exist_ok=True)
        (copy / link).rename(tmp_path / "moved")
    (copy / link).symlink_to(tmp_path / "moved")
    before = contents(copy)
    assert main(["status", "--run", str(copy)]) == 0
    assert f"\nnot looked at, as symbolic links: {link}\n" in capsys.readouterr().out
    assert main(["status", "--run", str(copy), "--verify"]) == 1
    assert f"not verified: {link} in {copy} is elsewhere" in capsys.readouterr().err
    assert main(["purge", "--run", str(copy), *FEW]) == 2
    assert f"{link} in {copy} is elsewhere, by a symbolic link" in capsys.readouterr().err
    assert contents(copy) == before


@pytest.mark.parametrize("array", ["outputs", "done"])
@pytest.mark.parametrize("spoil", [lambda f: f.unlink(), lambda f: f.write_bytes(b"{")])
def test_metadata_that_is_gone_is_written_again_and_no_block_is_lost(
    plain_copy, capsys, array, spoil
):
    before = contents(plain_copy)
    spoil(plain_copy / "full" / array / "zarr.json")
    words = ["status", "--run", str(plain_copy)]
    told = f"damaged: {plain_copy}/full/{array}/zarr.json"
    for refused in ([*words, "--verify"], ["purge", "--run", str(plain_copy), *FEW]):
        capsys.readouterr()
        assert main(refused) == 1
        err = capsys.readouterr().err
        assert told in err
        assert "dmm status --discard writes a zarr.json that is missing or cut short again" in err
    assert main([*words, "--discard"]) == 0
    assert main([*words, "--verify"]) == 0
    assert contents(plain_copy) == before


def test_metadata_that_was_changed_costs_no_block(plain_copy, capsys):
    file = plain_copy / "full" / "outputs" / "zarr.json"
    file.write_text(file.read_text().replace("float32", "float64"))
    before = contents(plain_copy)
    for word in ("--verify", "--discard"):
        assert main(["status", "--run", str(plain_copy), word]) == 1
        assert f"damaged: {file}; restore these from a copy" in capsys.readouterr().err
    assert contents(plain_copy) == before


def flipped(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    return content


def test_discarding_from_a_sound_run_changes_nothing(copy, capsys):
    sound = arrays(copy)
    assert main(["status", "--run", str(copy), "--discard"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert {line.split()[-1] for line in out.splitlines()[2:] if line[0].isalpha()} <= {
        "0",
        "hold",
    }
    assert arrays(copy) == sound


# -- files that others may have touched ----------------------------------------------------------


@pytest.fixture
def unlearned(run, tmp_path):
    """The file of a model that has forgotten some rows."""
    file = tmp_path / "model.safetensors"
    words = ["unlearn", "--run", str(run), *FEW, "--method", "do_nothing", "--out", str(file)]
    assert main(words) == 0
    return file


@pytest.mark.parametrize(
    "told",
    [
        "[]",
        "null",
        "3",
        '"forgotten"',
        "{",
        "",
        '{"forgotten": ["a"]}',
        '{"forgotten": ["a"], "salt": 3}',
        '{"forgotten": "a", "salt": "b"}',
        '{"forgotten": [["a"]], "salt": "b"}',
        '{"forgotten": null}',
        '{"index": "q"}',
        '{"index": [0]}',
    ],
)
@pytest.mark.parametrize("verb", ["predict", "unlearn"])
def test_a_checkpoint_with_damaged_provenance_is_refused(refused, run, unlearned, told, verb):
    file, out = unlearned.with_name("damaged.safetensors"), unlearned.with_name("out.safetensors")
    save_file(load_file(unlearned), file, metadata={"datamodel-matching": told})
    words = [verb, "--run", run, "--forget", "rows:9:12", "--checkpoint", file]
    if verb == "unlearn":
        words += ["--method", "fine_tune", "--out", out]
    assert refused(*words).startswith(f"cannot read the checkpoint '{file}': ")
    assert not out.exists()


@pytest.mark.parametrize("content", [[1, 2], (torch.zeros(2),), 3, torch.zeros(3)], ids=str)
def test_a_torch_file_of_something_else_is_refused(refused, run, tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    words = ["predict", "--run", run, *FEW, "--checkpoint", tmp_path / "model.pt"]
    told = refused(*words)
    assert told == (
        f"cannot read the checkpoint '{tmp_path}/model.pt': it holds a {type(content).__name__},"
        " not a state dict"
    )


def test_pictures_of_rows_that_the_task_does_not_know_are_refused(refused, copy):
    rows = [{"id": "train-3", "split": "forget"}, {"id": "train-99", "split": "forget"}]
    blocks = {"few": {"methods": {}, "affected": rows}}
    told = json.dumps({"schema": 1, "task": "small", "forget_sets": blocks})
    (copy / "evaluation.json").write_text(told)
    assert refused("report", "--run", copy, "--thumbnails") == (
        "the evaluation is of another task: 'small' has no row 'train-99'"
    )
    assert not (copy / "report.html").exists()
    assert main(["report", "--run", str(copy)]) == 0
