import hashlib

import numpy as np
import pytest

from stores.provenance import Provenance, check_provenance, digest, versions


def test_equal_settings_pass_in_any_order_and_as_tuples():
    stored = Provenance({"recipe": {"epochs": 8, "widths": [1, 2]}, "seed": 0})
    check_provenance(
        stored, Provenance({"seed": 0, "recipe": {"widths": (1, 2), "epochs": 8}}), "x"
    )


def test_every_differing_field_is_named_with_both_values():
    stored = Provenance({"recipe": {"epochs": 8}, "data": "a" * 200, "old": 1})
    wanted = Provenance({"recipe": {"epochs": 9}, "data": "b" * 200, "new": None})
    with pytest.raises(ValueError, match="runs/a was made with other settings") as caught:
        check_provenance(stored, wanted, "runs/a")
    text = str(caught.value)
    assert "recipe.epochs: stored 8, wanted 9" in text
    assert "old: stored 1, wanted nothing" in text
    assert "new: stored nothing, wanted None" in text
    assert "... (202 characters)" in text
    assert "a" * 100 not in text
    # On one line, as the command line prints it, each field still ends somewhere.
    assert text.endswith("wanted None;\ngive another folder, or the same settings")


def test_a_missing_setting_is_not_the_same_as_none():
    with pytest.raises(ValueError, match="seed: stored None, wanted nothing"):
        check_provenance(Provenance({"seed": None}), Provenance({}), "x")


def test_recorded_facts_only_warn():
    stored = Provenance({}, {"versions": {"numpy": "2.0"}})
    wanted = Provenance({}, {"versions": {"numpy": "2.1"}})
    with pytest.warns(UserWarning, match="versions.numpy: stored '2.0', wanted '2.1'"):
        check_provenance(stored, wanted, "x")


def test_values_that_json_cannot_hold_are_refused():
    with pytest.raises(TypeError, match=r"expected a plain value at settings\.a\[1\], got float64"):
        Provenance({"a": [0.0, np.float64(1)]})
    with pytest.raises(ValueError, match=r"expected a finite number at recorded\.a, got inf"):
        Provenance({}, {"a": float("inf")})
    with pytest.raises(TypeError, match="expected texts as keys of settings, got 1"):
        Provenance({1: 2})


def test_digest_frames_its_parts():
    parts = [
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        (b"abc",),
        (b"ab", b"c"),
        (np.frombuffer(b"abc", np.uint8),),
        (np.frombuffer(b"abc", np.int8),),
        (np.zeros((2, 3)),),
        (np.zeros((3, 2)),),
        (np.zeros(6),),
        (np.zeros(6, np.float32),),
        (np.zeros(0, np.float32),),
        (np.zeros((), np.float32),),
        (),
    ]
    assert len({digest(*part) for part in parts}) == len(parts)


def test_digest_reads_values_and_not_memory_order():
    values = np.arange(6.0).reshape(2, 3)
    assert digest(values) == digest(np.asfortranarray(values))
    assert digest("a") == hashlib.sha256(b"text:1:a").hexdigest()


@pytest.mark.parametrize("part", [1, None, np.array([None])])
def test_digest_refuses_objects(part):
    with pytest.raises(TypeError, match="expected bytes, texts or arrays of numbers"):
        digest(part)


def test_versions_skip_what_is_not_installed():
    found = versions("numpy", "no-such-distribution")
    assert found["numpy"] == np.__version__
    assert set(found) == {"numpy", "python"}
