"""Where CUDA graphs of a model's programs end."""

import pytest

from loongjax.pallas_kernels import graph_boundary
from tests.runtime.lowering import Lowering

NUM_LAYERS = 9


def num_boundaries(module: str) -> int:
    return module.count("custom_call @triton_kernel_call(")


@pytest.fixture(scope="module")
def lowering() -> Lowering:
    return Lowering(1, num_instances=1, num_layers=NUM_LAYERS)


@pytest.fixture
def gpu(monkeypatch) -> None:
    monkeypatch.setattr(graph_boundary, "is_triton_usable", lambda: True)


@pytest.mark.usefixtures("gpu")
def test_prefills_and_extends_are_a_graph_for_every_four_layers(lowering):
    assert num_boundaries(lowering.prefill(64)) == 2
    assert num_boundaries(lowering.extend(64)) == 2


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("tp", "num_instances"), [(2, 1), (1, 2)])
def test_programs_of_several_devices_are_not_cut(tp, num_instances):
    lowering = Lowering(tp, num_instances=num_instances, num_layers=5)
    assert num_boundaries(lowering.prefill(64)) == 0
    if num_instances == 1:
        assert num_boundaries(lowering.extend(64)) == 0


@pytest.mark.usefixtures("gpu")
def test_decodes_are_one_graph(lowering):
    assert num_boundaries(lowering.decode()) == 0


def test_without_triton_nothing_is_cut(lowering):
    assert num_boundaries(lowering.prefill(128)) == 0
