"""For every test: eight virtual CPU devices, strict dtypes and ranks, no network, no deadlines, a compilation cache."""

import os
import signal
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that runs the tests in the background has them, and whatever they start, ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
# XLA's CPU client can deadlock on few cores when collective programs are queued: it sizes its pool by this variable.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# NVLink multicast can take GPUs that others share out of service.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
if os.path.exists("/dev/nvidiactl"):
    # Several processes share a GPU, and compile more than they run.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ["XLA_FLAGS"] = " ".join(["--xla_gpu_autotune_level=0", os.environ.get("XLA_FLAGS", "")])
else:
    # Tests compile much and run little. XLA's older emitters for the CPU, in one piece, compile in a third of the time.
    os.environ["XLA_FLAGS"] = " ".join(
        [
            "--xla_backend_optimization_level=0",
            "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
            "--xla_cpu_parallel_codegen_split_count=1",
            os.environ.get("XLA_FLAGS", ""),
        ]
    )
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import hypothesis
import jax
import jaxtyping
import pytest

# Timings are never asserted.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compilation cache of the whole run, also of the servers: a process keeps the first one that it is given."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which all workers of a run share
    return folder / "xla"


@pytest.fixture
def users_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments of any type get through, as they do outside of tests, to what loongjax itself says about them."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
