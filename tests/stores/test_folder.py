import errno
import fcntl
import os

import pytest

from stores.folder import Folder
from tests.stores.place_contract import PlaceTests


class TestFolder(PlaceTests):
    @pytest.fixture
    def empty(self, tmp_path):
        return Folder(str(tmp_path / "place"))

    def test_a_dangling_link_is_no_free_place(self, empty):
        os.symlink("nowhere", empty.url)
        assert empty.taken()

    def test_links_are_named_and_not_followed(self, empty, tmp_path):
        Folder(str(tmp_path / "other")).write("b", b"1")
        empty.write("c/a", b"1")
        for name, to in [("c/file", "other/b"), ("c/folder", "other"), ("lost", "nowhere")]:
            os.symlink(tmp_path / to, f"{empty.url}/{name}")
        assert empty.links() == ["c/file", "c/folder", "lost"]
        assert "c/folder/b" not in empty.walk()

    @pytest.fixture
    def left(self, empty):
        """What a killed creation left, and folders of other names."""
        names = [
            f"{empty.name}.{'0a' * 16}.tmp",
            f"{empty.name}.tmp",
            f"x{empty.name}.{'0a' * 16}.tmp",
        ]
        for name in names:
            (empty.parent / name).write("mask/c/0", b"1")
        return empty.parent / names[0]

    def test_what_a_killed_creation_left_goes_with_the_next_one(self, empty, left):
        with empty.aside():
            assert not left.taken()
        assert len(empty.parent.walk()) == 2

    def test_what_somebody_still_creates_stays(self, empty, left):
        with empty.aside() as live, empty.aside() as other:
            live.write("a", b"1")
            other.move(empty)
            with empty.aside():
                assert live.read("a") == b"1"

    def test_a_filling_that_fails_leaves_nothing_beside_the_folder(self, empty):
        empty.write("zarr.json", b"theirs")
        with pytest.raises(OSError, match=empty.name):
            empty.fill({"a": b"1", "zarr.json": b"mine"})
        assert empty.parent.walk() == [f"{empty.name}/zarr.json"]

    def test_a_folder_that_was_swept_before_it_was_locked_is_made_again(self, empty, monkeypatch):
        made, makedirs = [], os.makedirs

        def swept(path):
            makedirs(path)
            made.append(path)
            if len(made) == 1:
                os.rmdir(path)

        monkeypatch.setattr(os, "makedirs", swept)
        with empty.aside() as aside:
            assert aside.taken()
        assert len(made) == 2

    def test_without_locks_nothing_is_swept(self, empty, left, monkeypatch):
        def refuse(*_):
            raise OSError(errno.ENOLCK, "no locks")

        monkeypatch.setattr(fcntl, "flock", refuse)
        with empty.aside(), empty.locked(alone=True), empty.locked(alone=True):
            assert left.taken()

    def test_nobody_shares_what_another_has_alone(self, empty):
        empty.write("a", b"1")
        for first, second in [(True, True), (True, False), (False, True)]:
            with empty.locked(alone=first) as real:
                assert real
                with pytest.raises(BlockingIOError):
                    empty.locked(alone=second).__enter__()
