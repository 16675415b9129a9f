import pytest
import torch

from attribution.devices import repeatable, visible_gpus, where_to_run


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


def test_a_scheduler_takes_the_place_of_workers(three_gpus):
    gpus, there = ["0", "1", "2"], "tcp://there:1"
    local = {"workers": 2, "scheduler": None, "gpus": gpus}
    assert where_to_run("cuda", 2, None) == local
    assert where_to_run("cuda:1", 0, there) == {"workers": None, "scheduler": there, "gpus": gpus}
    assert where_to_run("cpu", 0, None) == {"workers": 0, "scheduler": None, "gpus": None}


def precision():
    library = torch.backends.cudnn
    return library.deterministic, library.benchmark, library.conv.fp32_precision


@pytest.mark.parametrize("tf32", [True, False])
def test_repeatable_sets_a_gpu_and_restores_it(tf32):
    before = precision()
    with repeatable("cuda", tf32=tf32):
        inside = precision()
    assert inside == (True, False, before[2] if tf32 else "ieee")
    assert precision() == before
    with repeatable("cpu"):
        assert precision() == before


def test_repeatable_takes_the_settings_of_a_user():
    # Where somebody has used the newer settings the older ones cannot be read any more.
    holder = torch.backends.cudnn.conv
    before = holder.fp32_precision
    holder.fp32_precision = "ieee"
    try:
        with repeatable("cuda", tf32=True):
            assert holder.fp32_precision == "ieee"
        with repeatable("cuda"):
            assert holder.fp32_precision == "ieee"
        assert holder.fp32_precision == "ieee"
    finally:
        holder.fp32_precision = before
