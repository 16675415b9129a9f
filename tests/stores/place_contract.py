"""What every place promises, tried on an empty one."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from stores import place
from stores.places import Place


class PlaceTests:
    """Inherited by the tests of each kind of place, which give the fixture `empty`."""

    @pytest.fixture
    def empty(self) -> Place:
        raise NotImplementedError

    def test_nothing_is_there(self, empty):
        assert not empty.taken()
        assert not empty.exists("a")
        assert empty.names() == empty.names("folder") == empty.walk() == []

    def test_a_written_file_reads_back(self, empty):
        empty.write("folder/a", b"123")
        assert empty.read("folder/a") == (empty / "folder").read("a") == b"123"
        assert empty.size("folder/a") == 3
        assert empty.exists("folder/a")
        assert not empty.exists("folder")

    def test_an_empty_file_is_a_file(self, empty):
        empty.write("a", b"")
        assert empty.exists("a")
        assert empty.size("a") == 0
        assert empty.read("a") == b""

    def test_names_with_odd_characters(self, empty):
        empty.write("é/a b+%.json", b"1")
        assert empty.names("é") == ["a b+%.json"]
        assert empty.read(empty.walk()[0]) == b"1"

    def test_writing_again_replaces(self, empty):
        empty.write("a", b"123")
        empty.write("a", b"4")
        assert empty.read("a") == b"4"

    def test_creating_writes_where_nothing_is(self, empty):
        empty.create("folder/a", b"123")
        assert empty.read("folder/a") == b"123"
        with pytest.raises(FileExistsError):
            empty.create("folder/a", b"456")
        assert empty.read("folder/a") == b"123"
        assert empty.walk() == ["folder/a"]
        empty.remove("folder/a")
        empty.create("folder/a", b"456")
        assert empty.read("folder/a") == b"456"

    def test_one_of_many_creates(self, empty):
        def create(number):
            try:
                empty.create("a", b"%d" % number)
            except FileExistsError:
                return None
            return number

        with ThreadPoolExecutor(8) as threads:
            (winner,) = {n for n in threads.map(create, range(24)) if n is not None}
        assert empty.read("a") == b"%d" % winner
        assert empty.walk() == ["a"]

    def test_a_large_file(self, empty):
        content = np.random.default_rng(0).bytes(7 * 2**20 + 3)
        empty.write("a", content)
        assert empty.read("a") == content

    @pytest.mark.parametrize("missing", ["a", "nowhere/a"])
    def test_a_missing_file_is_named(self, empty, missing):
        empty.write("folder/b", b"123")
        for use in (empty.read, empty.size, empty.remove, empty.mapped):
            with pytest.raises(FileNotFoundError):
                use(missing)
        with pytest.raises(FileNotFoundError):
            list(empty.read_batches([{"folder/b": [0]}, {missing: [0]}], 3, 1))

    def test_ranges_of_several_files(self, empty):
        content = np.random.default_rng(0).integers(0, 256, (2, 500_000), dtype=np.uint8)
        for number in (0, 1):
            empty.write(f"c/{number}", content[number].tobytes())
        # Neighbours, overlaps, duplicates, far ones and the end, in any order.
        starts = [7, 14, 10, 499_993, 7, 0, 300_000]
        batches = [{"c/1": starts, "c/0": starts[3:]}, {"c/0": starts}]
        found = empty.read_batches(batches, 500_000, 7)
        for ranges, batch in zip(batches, found, strict=True):
            wanted = [
                content[int(name[2:]), start : start + 7]
                for name, starts in ranges.items()
                for start in starts
            ]
            assert np.array_equal(batch, wanted)

    def test_no_ranges(self, empty):
        assert list(empty.read_batches([], 3, 7)) == []

    @pytest.mark.parametrize("start", [0, 1, 3, 400_000])
    @pytest.mark.parametrize("size", [2, 400_003])
    def test_a_file_of_another_size_is_refused(self, empty, start, size):
        empty.write("folder/a", b"123")
        with pytest.raises(ValueError, match=rf"expected {size} bytes in .*folder/a, got 3"):
            list(empty.read_batches([{"folder/a": [start]}], size, 3))

    def test_a_mapped_file_can_be_changed_without_effect(self, empty):
        empty.write("a", b"123")
        mapped = empty.mapped("a")
        mapped[0] = 0
        assert empty.mapped("a").tobytes() == b"123"
        empty.write("none", b"")
        assert empty.mapped("none").size == 0
        assert mapped.dtype == np.uint8
        assert empty.read("a") == b"123"

    def test_a_generation_ends_when_the_root_is_written(self, empty):
        assert empty.generation() is None
        empty.write("zarr.json", b"1")
        first = empty.generation()
        assert first is not None
        empty.write("a/c/0", b"1")
        assert empty.generation() == first
        assert empty.mapped("a/c/0").tobytes() == b"1"
        empty.write("a/c/0", b"2")
        empty.write("zarr.json", b"2")
        assert empty.generation() != first
        assert empty.mapped("a/c/0").tobytes() == b"2"
        empty.clear()
        assert empty.generation() is None

    def test_names_and_walk(self, empty):
        for name in ("zarr.json", "full/zarr.json", "full/c/0", "full/c/1", "full-2/zarr.json"):
            empty.write(name, b"1")
        assert empty.names() == ["zarr.json"]
        assert empty.names("full/c") == ["0", "1"]
        assert (empty / "full").walk() == ["c/0", "c/1", "zarr.json"]
        assert len(empty.walk()) == 5

    def test_more_names_than_one_listing_gives(self, empty):
        many = 1003
        for number in range(many):
            empty.write(f"done/{number}", b"")
        assert sorted(map(int, empty.names("done"))) == list(range(many))
        assert len(empty.walk()) == many
        empty.clear()
        assert empty.walk() == []

    def test_removing(self, empty):
        empty.write("a", b"1")
        empty.write("b", b"2")
        empty.remove("a")
        assert empty.walk() == ["b"]

    def test_clearing_leaves_the_neighbours(self, empty):
        (empty / "full").write("c/0", b"1")
        (empty / "full-2").write("c/0", b"1")
        (empty / "full").clear()
        (empty / "full").clear()
        assert empty.walk() == ["full-2/c/0"]

    def test_moving(self, empty):
        aside, to = empty / "aside", empty / "folder" / "to"
        names = ["a/c/0", "a/zarr.json", "zarr.json"]
        for name in names:
            aside.write(name, name.encode())
        aside.move(to)
        assert not aside.taken()
        assert to.taken()
        assert empty.walk() == [
            f"folder/to/{name}" for name in ("a/c/0", "a/zarr.json", "zarr.json")
        ]
        assert to.read("a/c/0") == b"a/c/0"

    def test_moving_to_a_taken_place_is_refused(self, empty):
        for name in ("one", "two"):
            (empty / name).write("zarr.json", name.encode())
        with pytest.raises(OSError, match="two"):
            (empty / "one").move(empty / "two")
        assert (empty / "two").read("zarr.json") == b"two"

    def test_names_of_places(self, empty):
        below = empty / "folder" / "to"
        assert below.name == "to"
        assert below.parent == empty / "folder"
        assert str(below) == below.url == f"{empty.url}/folder/to"
        assert place(below) is below
        assert place(str(below)) == below

    def test_pickling(self, empty):
        empty.write("a", b"123")
        again = pickle.loads(pickle.dumps(empty))
        assert again == empty
        assert again.read("a") == b"123"

    def test_any_number_may_lock_what_nobody_has_alone(self, empty):
        with empty.locked(alone=False), empty.locked(alone=True):
            empty.write("a", b"1")  # nothing was there that could be locked
        with empty.locked(alone=False), empty.locked(alone=False):
            assert empty.walk() == ["a"]
        with empty.locked(alone=True):
            assert empty.walk() == ["a"]

    def test_a_filled_place_holds_the_files_and_nothing_lies_beside_it(self, empty):
        names = ["a/c/0", "a/zarr.json", "zarr.json"]
        empty.fill({name: memoryview(name.encode()) for name in names})
        assert empty.taken()
        assert {name: empty.read(name) for name in empty.walk()} == {
            name: name.encode() for name in names
        }
        assert empty.parent.walk() == [f"{empty.name}/{name}" for name in names]

    def test_a_taken_place_is_not_filled(self, empty):
        empty.write("zarr.json", b"theirs")
        with pytest.raises(OSError, match=empty.name):
            empty.fill({"a": b"1", "zarr.json": b"mine"})
        assert empty.read("zarr.json") == b"theirs"

    def test_syncing(self, empty):
        empty.write("a", b"123")
        empty.sync(["a"])
        assert empty.read("a") == b"123"
