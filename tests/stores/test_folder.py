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
