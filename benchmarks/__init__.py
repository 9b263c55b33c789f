"""Measurements, each a module with a command line, and their results."""

import os

# Before JAX starts. NVLink multicast can take GPUs that others share out of service, XLA's CPU client can deadlock in a
# small thread pool, and NCCL must launch on every GPU in one order.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
os.environ.setdefault("NPROC", "32")
