"""Eight virtual CPU devices, strict dtypes and ranks, and no network, for every test."""

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that runs the tests in the background has them, and whatever they start, ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
# XLA's CPU client can deadlock on few cores when collective programs are queued: it sizes its pool by this variable.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# NVLink multicast can take GPUs that others share out of service.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
if not os.path.exists("/dev/nvidiactl"):
    # Tests compile much and run little: on the CPU this takes a third off the time.
    os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
