import pickle
import sys
import time

import numpy as np
import pytest

from stores import ArraySpec, Provenance, Store, StoreSpec, bucket_memory, place
from stores.bucket import Bucket
from stores.bucket_client import client, plain_errors
from tests.stores.place_contract import PlaceTests
from tests.stores.small_store import refuse_after_a_look_amid_discard


class TestBucket(PlaceTests):
    @pytest.fixture
    def empty(self, bucket):
        return place(f"{bucket}/runs/one")

    def test_a_whole_bucket_is_a_place(self, bucket):
        whole = place(f"{bucket}/")
        whole.write("a/b", b"1")
        assert whole.url == bucket
        assert whole.names("a") == ["b"]
        assert whole.walk() == ["a/b"]
        whole.clear()
        assert whole.walk() == []

    def test_a_killed_creation_leaves_a_free_place(self, empty):
        for name in ("zarr.json", "a/zarr.json", "a/c/0"):
            (empty / "aside").write(name, b"made alike")
        (empty / "to").write("a/zarr.json", b"made alike")
        assert not (empty / "to").taken()
        (empty / "aside").move(empty / "to")
        assert (empty / "to").walk() == ["a/c/0", "a/zarr.json", "zarr.json"]

    def test_a_killed_filling_is_finished_by_the_same_one(self, empty):
        files = dict.fromkeys(["zarr.json", "a/zarr.json", "a/c/0"], b"made alike")
        empty.write("a/zarr.json", b"made alike")
        assert not empty.taken()
        empty.fill(files)
        assert {name: empty.read(name) for name in empty.walk()} == files

    def test_arrays_are_told_of_first_and_the_root_comes_last(self, empty, monkeypatch):
        written = []

        def noted(place, name, content):
            time.sleep(0.05 * name.endswith("zarr.json"))
            written.append(name)

        monkeypatch.setattr(type(empty), "create", noted)
        empty.fill(dict.fromkeys(["zarr.json", "a/zarr.json", "a/c/0"], b"1"))
        assert written == ["a/zarr.json", "a/c/0", "zarr.json"]

    def test_another_creation_is_not_overwritten(self, empty):
        for name in ("zarr.json", "a/c/0"):
            (empty / "aside").write(name, b"mine")
        (empty / "to").write("a/c/0", b"theirs")
        with pytest.raises(FileExistsError, match=r"to/a/c/0 is there already and differs; remove"):
            (empty / "aside").move(empty / "to")
        with pytest.raises(FileExistsError, match=r"to/a/c/0 is there already and differs; remove"):
            (empty / "to").fill({"zarr.json": b"mine", "a/c/0": b"mine"})
        assert (empty / "to").walk() == ["a/c/0"]
        assert (empty / "to").read("a/c/0") == b"theirs"

    def test_the_view_of_zarr_is_pickled_without_credentials(self, empty):
        sent = pickle.dumps(empty.zarr())
        assert b"secret" not in sent
        assert pickle.loads(sent) == empty.zarr()


def test_who_looks_while_a_block_is_discarded_does_not_trust_it_afterwards(bucket, monkeypatch):
    spec = StoreSpec("scores", "train", 2, {"scores": ArraySpec(("train",), (3,), "float32")})
    store = Store.create(place(f"{bucket}/store"), spec, Provenance({}))
    store.write_block(0, {"scores": np.ones(2, np.float32)})
    refuse_after_a_look_amid_discard(store, 0, monkeypatch)


def test_a_store_that_lost_its_root_is_not_made_again_over_its_blocks(bucket):
    spec = StoreSpec("scores", "train", 2, {"scores": ArraySpec(("train",), (3,), "float32")})
    where = place(f"{bucket}/store")
    store = Store.create(where, spec, Provenance({"seed": 1}))
    store.write_block(0, {"scores": np.ones(2, np.float32)})
    where.remove("zarr.json")
    with pytest.raises(ValueError, match=r"store has lost its zarr\.json but holds"):
        Store.open_or_create(where, spec, Provenance({"seed": 2}))
    where.clear()
    assert Store.open_or_create(where, spec, Provenance({"seed": 2})).pending() == [0, 1]


@pytest.mark.parametrize("url", ["s3://", "s3:///a", "s3://bucket//a", "s3://bucket/../a"])
def test_an_odd_address_is_refused(url):
    with pytest.raises(ValueError, match="expected an address s3://bucket/prefix"):
        place(url)


def test_a_missing_bucket_is_refused(bucket):
    with pytest.raises(ValueError, match=r"expected the bucket s3://nowhere.*create the bucket"):
        place("s3://nowhere/run")


def test_a_service_that_does_not_answer_is_refused(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"at http://127.0.0.1:9.*correct AWS_ENDPOINT_URL"):
        place(f"{bucket}/run")


def test_missing_credentials_are_refused(bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    # Where a machine in the cloud would tell its own credentials.
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"expected credentials: set AWS_ACCESS_KEY_ID"):
        place(f"{bucket}/run")


def test_a_public_bucket_needs_no_credentials(bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert place(f"{bucket}/run").walk() == []


def test_a_bad_setting_is_refused(bucket, monkeypatch):
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "perhaps")
    with pytest.raises(ValueError, match=r"AWS_ variables.*perhaps"):
        place(f"{bucket}/run")


def test_a_missing_package_is_named(monkeypatch):
    for name in ("obstore", "obstore.exceptions", "obstore.store"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'datamodel-matching\[s3\]'"):
        place("s3://bucket-without-package/run")


def test_errors_of_the_service_are_plain(bucket):
    # An address that is not looked at first.
    with pytest.raises(ConnectionError, match=r"listing s3://gone.* failed: NoSuchBucket"):
        Bucket("s3://gone/run").walk()


class TestMemory:
    @pytest.fixture
    def store(self, bucket):
        store = place(f"{bucket}/store")
        store.write("zarr.json", b"1")
        store.write("a/c/0", b"123")
        return store

    def behind(self, store, name, content):
        """Write as another process would."""
        with plain_errors("writing"):
            client(store.url.split("/")[2]).put(f"store/{name}", content)

    def test_a_mapped_file_is_read_once(self, store):
        store.mapped("a/c/0")
        self.behind(store, "a/c/0", b"456")
        assert store.mapped("a/c/0").tobytes() == b"123"

    def test_what_others_write_shows_when_the_root_is_asked_for_again(self, store, monkeypatch):
        store.mapped("a/c/0")
        self.behind(store, "a/c/0", b"456")
        self.behind(store, "zarr.json", b"2")
        first = store.generation()
        assert store.mapped("a/c/0").tobytes() == b"123"
        monkeypatch.setattr(bucket_memory, "_FRESH_SECONDS", 0)
        assert store.generation() != first
        assert store.mapped("a/c/0").tobytes() == b"456"

    def test_a_file_written_again_is_read_again_under_the_same_root(self, store):
        first = store.generation()
        store.mapped("a/c/0")
        store.remove("a/c/0")
        with pytest.raises(FileNotFoundError):
            store.mapped("a/c/0")
        store.write("a/c/0", b"456")
        assert store.mapped("a/c/0").tobytes() == b"456"
        assert store.generation() == first
        store.parent.write("store/a/c/0", b"789")
        assert store.mapped("a/c/0").tobytes() == b"789"

    def test_the_files_used_last_are_kept(self, store, monkeypatch):
        monkeypatch.setattr(bucket_memory, "_MOST_BYTES", 7)
        for name in ("a/c/1", "a/c/2"):
            store.write(name, b"123")
        for name in ("a/c/0", "a/c/1", "a/c/0", "a/c/2"):
            store.mapped(name)
        kept = [name for url, name in bucket_memory._files if url == store.url]
        assert kept == ["a/c/0", "a/c/2"]
