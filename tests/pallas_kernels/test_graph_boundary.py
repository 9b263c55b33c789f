"""The end of a CUDA graph changes nothing but where graphs end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from loongjax.pallas_kernels import graph_boundary
from loongjax.pallas_kernels.graph_boundary import end_graph

UNTYPED = jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call")


def lower(function) -> str:
    """The module that a GPU would be given, of one operand."""
    exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=[UNTYPED])
    return exported(jax.ShapeDtypeStruct((8, 3), "bfloat16")).mlir_module()


@pytest.fixture
def gpu(monkeypatch) -> None:
    monkeypatch.setattr(graph_boundary, "is_triton_usable", lambda: True)


def test_without_a_gpu_it_is_the_value_itself():
    x = jnp.arange(5.0)
    assert end_graph(x) is x
    assert "custom_call" not in lower(end_graph)


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_it_is_a_call_that_graphs_do_not_hold_in_the_values_own_memory():
    [call] = [line for line in lower(lambda x: end_graph(2 * x) + 1).splitlines() if "custom_call" in line]
    assert "@triton_kernel_call(" in call, "the typed one would be recorded"
    assert "api_version = 2" in call
    assert "output_tuple_indices = [], operand_index = 0" in call


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("check_vma", [False, True])
def test_it_lowers_inside_shard_map(check_vma):
    mesh = Mesh(np.array(jax.devices()[2:4]), ("sp",))
    mapped = jax.shard_map(end_graph, mesh=mesh, in_specs=P("sp"), out_specs=P("sp"), check_vma=check_vma)
    assert lower(mapped).count("custom_call @triton_kernel_call(") == 1
