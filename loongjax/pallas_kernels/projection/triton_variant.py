"""Products of few rows with large matrices by one Triton kernel."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Float

from loongjax.errors import ConfigError
from loongjax.pallas_kernels.projection.kernel import project_kernel
from loongjax.pallas_kernels.triton_call import triton_call
from loongjax.pallas_kernels.triton_gpu import num_multiprocessors
from loongjax.pallas_kernels.varying import vary_as

DTYPES = ("bfloat16", "float16")
MOST_TOKENS = 32
"""More are better served by a product that reads its left operand in blocks, too."""
MOST_WEIGHTS = 3
LEAST_PADDED_TOKENS = 8
"""Columns of the smallest product of tensor cores."""
ALIGNMENT = 8
"""Elements of one load of 16 bytes: rows begin at multiples of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectionTuning:
    """How the work is cut."""

    block_o: int
    """Rows of a matrix that a program has at a time: a power of two."""
    block_i: int
    """Their elements at a time: a power of two, at least 16."""
    num_warps: int
    stages: int
    """Blocks in flight: 1 loads to registers, more to shared memory."""
    programs_per_processor: int | None = None
    """Where there are more blocks of rows, rows are dealt out evenly to so many; None: each program has one block."""
    uses_tensor_cores: bool = True
    """Only for one token may it be False."""

    def __post_init__(self) -> None:
        for name, value, least in (("block_o", self.block_o, 1), ("block_i", self.block_i, 16)):
            if value < least or value & (value - 1):
                raise ConfigError(f"{name} must be a power of two of at least {least}, got {value}")

    def rows_per_program(self, num_rows: int) -> int:
        """Of so many rows of all matrices."""
        if self.programs_per_processor is None:
            return self.block_o
        return max(self.block_o, -(-num_rows // (num_multiprocessors() * self.programs_per_processor)))


ONE_TOKEN = ProjectionTuning(block_o=4, block_i=2048, num_warps=8, stages=1, uses_tensor_cores=False)
FEW_TOKENS = ProjectionTuning(block_o=16, block_i=256, num_warps=2, stages=4, programs_per_processor=3)
MORE_TOKENS = ProjectionTuning(block_o=32, block_i=256, num_warps=4, stages=4, programs_per_processor=2)


MOST_GATED_TOKENS = 8
"""More also take up to 144 KiB of shared memory, which small GPUs do not have."""
MOST_ROWS_OF_FEW_TOKENS = 24_000
"""Of all matrices together."""


def is_fastest(num_tokens: int, num_rows: int, *, is_gated: bool) -> bool:
    """Whether the kernel beats XLA's products on an H200, where it was measured with the shapes of Llama-2-7B: always
    with one token; with up to `MOST_GATED_TOKENS` if gated, and otherwise, if the matrices together have no more rows
    than those of a layer.
    """
    if num_rows == 0:
        return False
    if num_tokens == 1:
        return True
    return num_tokens <= MOST_GATED_TOKENS if is_gated else num_rows <= MOST_ROWS_OF_FEW_TOKENS


def default_tuning(num_tokens: int, *, is_gated: bool) -> ProjectionTuning:
    """The tuning for so many tokens."""
    if num_tokens == 1 and not is_gated:
        return ONE_TOKEN
    return FEW_TOKENS if num_tokens <= 8 else MORE_TOKENS


def is_supported(dtype: str, num_tokens: int, in_dim: int, num_weights: int) -> bool:
    """Whether there is a kernel for rows so many, so long, and of this dtype, and for so many matrices."""
    has_rows = 1 <= num_tokens <= MOST_TOKENS and in_dim > 0 and in_dim % ALIGNMENT == 0
    return dtype in DTYPES and has_rows and 1 <= num_weights <= MOST_WEIGHTS


def triton_project(
    x: Float[Array, "T I"],
    weights: tuple[Float[Array, "_ I"], ...],
    *,
    out_dtype: np.dtype,
    tuning: ProjectionTuning | None = None,
) -> tuple[Float[Array, "T _"], ...]:
    """See `project`."""
    _check_supported("project", x, weights)
    return _launch(x, weights, [weight.shape[0] for weight in weights], out_dtype=out_dtype, tuning=tuning)


def triton_project_gated(
    x: Float[Array, "T I"],
    gate: Float[Array, "F I"],
    up: Float[Array, "F I"],
    *,
    tuning: ProjectionTuning | None = None,
) -> Float[Array, "T F"]:
    """See `project_gated`."""
    _check_supported("project_gated", x, (gate, up))
    return _launch(x, (gate, up), [gate.shape[0]], out_dtype=x.dtype, tuning=tuning)[0]


def _launch(
    x: jax.Array,
    weights: tuple[jax.Array, ...],
    out_dims: list[int],
    *,
    out_dtype: np.dtype,
    tuning: ProjectionTuning | None,
) -> tuple[jax.Array, ...]:
    """As many results as there are `out_dims`; gated if that is fewer than matrices."""
    num_tokens, in_dim = x.shape
    is_gated = len(out_dims) < len(weights)
    tuning = default_tuning(num_tokens, is_gated=is_gated) if tuning is None else tuning
    rows_per_program = tuning.rows_per_program(sum(out_dims))
    num_missing = MOST_WEIGHTS - len(out_dims)
    a_rows, b_rows, c_rows = *out_dims, *(0,) * num_missing
    # In place of matrices that are not there: the first again, of which no rows are read, and results of one element.
    results = [jax.ShapeDtypeStruct((num_tokens, rows), out_dtype) for rows in out_dims]
    padded_tokens = max(LEAST_PADDED_TOKENS, 1 << (num_tokens - 1).bit_length())
    projected = triton_call(
        x,
        *weights,
        *weights[:1] * (MOST_WEIGHTS - len(weights)),
        kernel=project_kernel,
        name="project_gated" if is_gated else "project",
        out_shape=[*results, *[jax.ShapeDtypeStruct((1,), out_dtype)] * num_missing],
        grid=(sum(-(-rows // rows_per_program) for rows in out_dims),),
        num_warps=tuning.num_warps,
        num_stages=tuning.stages,
        a_rows=a_rows,
        b_rows=b_rows,
        c_rows=c_rows,
        num_tokens=num_tokens,
        in_dim=in_dim,
        is_gated=is_gated,
        uses_tensor_cores=tuning.uses_tensor_cores,
        padded_tokens=padded_tokens if tuning.uses_tensor_cores else 1,
        rows_per_program=rows_per_program,
        block_o=tuning.block_o,
        block_i=tuning.block_i,
        stages=tuning.stages,
    )
    return vary_as(tuple(projected[: len(out_dims)]), x, weights)


def _check_supported(op: str, x: jax.Array, weights: tuple[jax.Array, ...]) -> None:
    if not is_supported(x.dtype.name, x.shape[0], x.shape[1], len(weights)):
        raise ValueError(
            f"{op}: implementation 'triton' takes up to {MOST_WEIGHTS} matrices and {MOST_TOKENS} rows of "
            f"{' or '.join(DTYPES)} whose length is a multiple of {ALIGNMENT}, got {len(weights)} matrices and "
            f"{x.dtype.name}{list(x.shape)}: 'reference' takes any"
        )
