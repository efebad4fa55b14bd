"""How a run computes: what a recipe's [compute] means on a device."""

import pytest
import torch

from deepshare.train import load_recipe
from deepshare.train.compute import Compute, ComputeRecipe
from deepshare.train.errors import RecipeError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_is_decided_by_the_device():
    assert ComputeRecipe().on(CPU) == Compute(CPU, bf16=False, channels_last=True, graph=False, compile=False)
    assert ComputeRecipe().on(CUDA) == Compute(CUDA, bf16=True, channels_last=True, graph=True, compile=False)


def test_what_is_said_overrides_the_device():
    said = ComputeRecipe(precision="fp32", channels_last=False, graph=False, compile=True)
    assert said.on(CUDA) == Compute(CUDA, bf16=False, channels_last=False, graph=False, compile=True)
    assert ComputeRecipe(precision="bf16", channels_last=True).on(CPU).bf16


def test_a_graph_on_the_cpu_is_refused():
    with pytest.raises(RecipeError, match=r"compute\.graph: wanted .* on cpu, got true"):
        ComputeRecipe(graph=True).on(CPU)


def test_several_processes_have_no_graph():
    assert not ComputeRecipe().on(CUDA, 2).graph
    with pytest.raises(RecipeError, match=r"compute\.graph: wanted .* for 2 processes, got true"):
        ComputeRecipe(graph=True).on(CUDA, 2)
    with pytest.raises(RecipeError, match=r"compute\.compile: wanted false for 2 processes, got true"):
        ComputeRecipe(compile=True).on(CUDA, 2)


def test_batch_norms_are_synced_unless_a_recipe_says_otherwise():
    assert load_recipe("demo-240").compute.on(CPU).sync_batch_norm
    assert not load_recipe("demo-240", ["compute.sync_batch_norm=false"]).compute.on(CPU).sync_batch_norm


def test_a_recipe_says_how_to_compute():
    recipe = load_recipe("demo-240", ["compute.precision=bf16", "compute.channels_last=true", "compute.graph=auto"])
    assert recipe.compute == ComputeRecipe("bf16", True, "auto", False)
    assert load_recipe("demo-240").compute == ComputeRecipe()
    assert "[compute]" in recipe.to_toml()
