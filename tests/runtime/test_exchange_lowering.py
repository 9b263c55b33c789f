"""With peers, a group's programs lower for CUDA to the exchange kernels, as few as a layer needs, and to no collective
of XLA's where messages are small."""

import re

import pytest

from loongjax.pallas_kernels.extend_attention import api as extend_api
from loongjax.pallas_kernels.kv_update import api as kv_update_api
from loongjax.pallas_kernels.prefill_attention import api as prefill_api
from tests.runtime.lowering import NUM_LAYERS, Lowering


def num_kernels(module: str) -> int:
    return module.count("custom_call @triton_kernel_call_ffi")


@pytest.fixture(scope="module", params=[1, 2], ids="tp{}".format)
def lowering(request) -> Lowering:
    return Lowering(request.param)


def sums_of_tp(lowering: Lowering, num_layers: int = NUM_LAYERS) -> int:
    """Of the embedding, and of attention's and the feed-forward's output in every layer."""
    return 1 + 2 * num_layers if lowering.spec.tp > 1 else 0


def test_a_decode_exchanges_by_kernels_alone(lowering):
    """Queries out and partial outputs back: two kernels a layer for the masters."""
    module = lowering.decode()
    assert num_kernels(module) == sums_of_tp(lowering) + 2 * NUM_LAYERS
    assert lowering.collectives(module) == set()


def test_a_short_prefill_sums_by_kernels_and_tells_how_they_went(lowering):
    module = lowering.prefill(64)
    assert num_kernels(module) == sums_of_tp(lowering) + 1
    assert "all_reduce" not in lowering.collectives(module)


def test_a_long_prefill_leaves_its_sums_to_xla(lowering):
    module = lowering.prefill(16_448)
    assert num_kernels(module) == 1
    assert ("all_reduce" in lowering.collectives(module)) == (lowering.spec.tp > 1)


def test_the_sampler_gathers_its_logits_by_a_kernel_and_tells_how_all_went(lowering):
    module = lowering.sample()
    assert num_kernels(module) == (2 if lowering.spec.tp > 1 else 1)
    assert lowering.collectives(module) == set()


@pytest.mark.parametrize("tp", [1, 2])
def test_an_extend_sums_by_kernels_and_tells_how_they_went(tp):
    """Its attention is one instance's own."""
    lowering = Lowering(tp, num_instances=1)
    module = lowering.extend(64)
    assert num_kernels(module) == sums_of_tp(lowering) + 1
    assert lowering.collectives(module) == set()
    assert_in_one_order(module)


def test_an_extend_attends_and_keeps_its_keys_by_kernels_where_there_are_some(monkeypatch):
    """In the text there is a function of two for the keys before, one of one for the chunks among themselves, and one
    kernel a layer that keeps their keys."""
    for api in (extend_api, prefill_api):
        monkeypatch.setattr(api, "default_variant", lambda *arguments, **settings: "triton")
    monkeypatch.setattr(kv_update_api, "is_triton_usable", lambda: True)
    lowering = Lowering(2, num_instances=1)
    assert num_kernels(lowering.extend(128)) == sums_of_tp(lowering) + 1 + 2 + 1 + NUM_LAYERS


def test_without_peers_there_are_only_xlas_collectives():
    lowering = Lowering(2, has_peers=False)
    for module in (lowering.decode(), lowering.prefill(64), lowering.sample()):
        assert num_kernels(module) == 0
        assert lowering.collectives(module) & {"all_reduce", "all_gather"}


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_every_exchange_takes_in_something_of_the_one_before(name):
    """Else XLA could run two at once, or in other orders on two devices."""
    lowering = Lowering(2)
    module = lowering.decode() if name == "decode" else lowering.prefill(64)
    assert_in_one_order(module)


def assert_in_one_order(module: str) -> None:
    """In the text of a module, every kernel's operands follow from the results of the kernel before it."""
    for body in re.split(r"func\.func", module):
        follows: dict[str, int] = {}
        """By value, how many of the function's exchanges it follows from."""
        num_exchanges = 0
        for line in body.splitlines():
            match = re.match(r"\s*(%\w+)(?::\d+)? = (.*)", line)
            if match is None:
                continue
            result, rest = match.groups()
            operands = [operand.split("#")[0] for operand in re.findall(r"%\w+(?:#\d+)?", rest)]
            newest = max((follows.get(operand, 0) for operand in operands), default=0)
            if "@triton_kernel_call_ffi" in rest:
                assert newest == num_exchanges, line[:200]
                newest = num_exchanges = num_exchanges + 1
            follows[result] = newest
