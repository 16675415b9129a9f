import pytest
import torch

from attribution.devices import visible_gpus


@pytest.fixture
def three_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_work_on_the_cpu_needs_no_gpu(three_gpus):
    assert visible_gpus("cpu", 2, None) is None


def test_gpus_are_numbered(three_gpus):
    assert visible_gpus("cuda", None, None) == ["0", "1", "2"]


def test_gpus_keep_the_names_by_which_they_are_visible(three_gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,MIG-1,2,-1,0")
    assert visible_gpus(torch.device("cuda"), 2, None) == ["4", "MIG-1", "2"]


def test_one_gpu_by_its_number_is_for_this_process_or_a_scheduler(three_gpus):
    assert visible_gpus("cuda:1", 0, None) == ["0", "1", "2"]
    assert visible_gpus("cuda:1", None, "tcp://there:1") == ["0", "1", "2"]
    with pytest.raises(ValueError, match="no cuda:1: give the device cuda with CUDA_VISIBLE_DEV"):
        visible_gpus("cuda:1", 2, None)
