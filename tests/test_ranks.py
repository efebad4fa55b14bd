"""What a process knows of the others, without any."""

import pytest
import torch
from rank_runs import free_port, variables_of
from torch import nn

from deepshare.train import TrainingError, distributed
from deepshare.train.distributed import Ranks, joined


def test_without_torchrun_a_process_is_alone():
    with joined() as ranks, joined() as again:
        assert ranks == again == Ranks(0, 1)
        assert ranks.is_writer
        model = nn.Sequential(nn.BatchNorm2d(2))
        assert ranks.parallel(model, sync_batch_norm=True) is model
        assert ranks.agree(lambda: 1) + ranks.from_writer(lambda: 2) == 3
        assert ranks.mean(0.1) == 0.1
        with pytest.raises(KeyError):
            ranks.agree(lambda: {}["nothing"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": "2"}, r"RANK: wanted less than WORLD_SIZE \(2\), got 2"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK: wanted a number, as torchrun sets it beside WORLD_SIZE, got ''"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE: wanted a number"),
        ({"DEEPSHARE_RANK_TIMEOUT": "soon"}, "DEEPSHARE_RANK_TIMEOUT: wanted seconds, .* got 'soon'"),
    ],
)
def test_variables_that_no_torchrun_sets_are_refused(monkeypatch, changes, words):
    for name, value in (variables_of(1, 2, free_port()) | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=words), joined("cpu"):
        pass


def test_a_device_that_is_none_is_refused(monkeypatch):
    for name, value in variables_of(0, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match="device 'abacus' cannot be used here"), joined("abacus"):
        pass


@pytest.mark.parametrize(
    ("local_world", "device", "place", "backend"),
    [
        (2, None, "cuda:1", "cpu:gloo,cuda:nccl"),
        (2, "cuda", "cuda:1", "cpu:gloo,cuda:nccl"),
        (2, "cuda:0", "cuda:0", "gloo"),
        (2, "cpu", "cpu", "gloo"),
        (3, "cuda", "wanted a GPU for each of the 3 processes on this machine, it has 2", None),
    ],
)
def test_each_rank_of_a_machine_has_a_gpu_of_its_own(monkeypatch, local_world, device, place, backend):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    numbers = {"LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": local_world}
    if backend is None:
        with pytest.raises(TrainingError, match=place):
            distributed._place(device, numbers)
    else:
        assert distributed._place(device, numbers) == (torch.device(place), backend)


@pytest.mark.parametrize(
    ("world", "batch_size", "sync", "words"),
    [
        (2, 33, True, "batch_size: wanted a multiple of the 2 processes that share it, got 33"),
        (2, 2, False, "wanted at least 2 images for each of the 2 processes where batch norms are not synced, got 2"),
        (2, 2, True, None),
        (2, 4, False, None),
        (1, 33, False, None),
    ],
)
def test_a_batch_must_have_equal_parts(world, batch_size, sync, words):
    ranks = Ranks(0, world)
    if words is None:
        ranks.check_share(batch_size, "batch_size", sync_batch_norm=sync)
    else:
        with pytest.raises(ValueError, match=words):
            ranks.check_share(batch_size, "batch_size", sync_batch_norm=sync)
