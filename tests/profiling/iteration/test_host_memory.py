"""What virtual devices would take of a machine's memory."""

import os

import pytest

from loongjax.errors import ConfigError
from loongjax_profiling.iteration.host_memory import check_host_memory
from loongjax_profiling.model_shapes import MODEL_SHAPES

LLAMA3_8B = MODEL_SHAPES["llama3-8b"]
# Its 8.03e9 parameters in 16 bits, less the norms; and 128 KiB a token.
WEIGHT_BYTES = 2 * 8_030_000_000
TOKEN_BYTES = 128 * 1024


@pytest.mark.parametrize(("num_instances", "num_slots"), [(1, 1), (8, 16_384)])
def test_every_instance_has_its_weights_and_its_pool(num_instances, num_slots):
    needed = num_instances * (WEIGHT_BYTES + num_slots * TOKEN_BYTES)
    sizes = {"num_instances": num_instances, "num_slots": num_slots}
    check_host_memory(LLAMA3_8B, **sizes, memory_bytes=int(1.01 * needed))
    with pytest.raises(ConfigError, match=f"{num_instances} instances on CPU take"):
        check_host_memory(LLAMA3_8B, **sizes, memory_bytes=int(0.99 * needed))


def test_a_small_model_fits_into_any_machine_that_runs_these_tests():
    assert os.sysconf("SC_PHYS_PAGES") > 0
    check_host_memory(MODEL_SHAPES["tiny"], num_instances=8, num_slots=16_384)
