"""Model shapes, coefficients, and measurements made from them, for the tests of this room."""

import itertools

import numpy as np

from loongjax.costmodel.decode_time import DecodeTime
from loongjax.costmodel.measurement import DecodePoint, Measurements, MigrationPoint, Padding, PrefillPoint, Provenance
from loongjax.costmodel.migration_time import MigrationTime
from loongjax.costmodel.model_shape import ModelShape
from loongjax.costmodel.prefill_time import RefinedPrefillTime
from loongjax.costmodel.work import DecodeTotals, DecodeWork, PrefillWork, Strategy

LLAMA2_7B = ModelShape(
    hidden_size=4096,
    num_layers=32,
    num_q_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate_size=11008,
    vocab_size=32000,
)
PROVENANCE = Provenance(hardware="4 x NVIDIA H200", model=LLAMA2_7B, commit="0123abc")
PADDING = Padding(token_buckets=(64, 256, 1024, 4096, 16384), row_buckets=(1, 4, 16, 64))
MIGRATION = MigrationTime(latency_s=1e-4, per_byte_s=1 / 150e9)


def refined(sp: int, floor_s: float = 0.008) -> RefinedPrefillTime:
    return RefinedPrefillTime(
        floor_s=floor_s,
        constant_s=0.002,
        per_padded_token_s=2e-5,
        per_squared_token_s=5e-10 / sp,
        extend_constant_s=0.001,
        per_new_times_past_s=1.2e-9 / sp,
        per_past_key_s=3e-7,
        sp=sp,
        token_buckets=PADDING.token_buckets,
    )


def decode(sp: int) -> DecodeTime:
    return DecodeTime(
        constant_s=0.004,
        per_padded_row_s=2e-5,
        per_key_s=1e-7,
        per_exchanged_row_s=4e-6 if sp > 1 else 0.0,
        per_extra_master_s=2e-4 if sp > 1 else 0.0,
        sp=sp,
        row_buckets=PADDING.row_buckets,
    )


def measurements(strategies: tuple[Strategy, ...], noise: float = 0.0, seed: int = 0) -> Measurements:
    """What an engine would measure that takes these times, each off by a normal error of this relative size."""
    random = np.random.default_rng(seed)

    def measured(seconds: float) -> float:
        return seconds * float(np.exp(noise * random.normal()))

    prefills = [PrefillWork(new_lens=(n,) * b) for b in (1, 4, 16) for n in (10, 100, 700, 3000, 20_000, 90_000)]
    prefills += [PrefillWork(new_lens=(n,), past_lens=(p,)) for n in (32, 512, 4096) for p in (8192, 65_536, 200_000)]
    prefills += [PrefillWork(new_lens=(512, *[1] * b), past_lens=(8192, *[3000] * b)) for b in (4, 50)]
    return Measurements(
        provenance=PROVENANCE,
        prefills=tuple(
            PrefillPoint(
                strategy=s,
                work=work,
                measured_s=measured(refined(s.sp).seconds(work.totals).item()),
                padding=PADDING,
            )
            for s in strategies
            for work in prefills
        ),
        decodes=tuple(
            DecodePoint(
                strategy=s,
                work=work,
                measured_s=measured(decode(s.sp).seconds(DecodeTotals.of([work])).item()),
                padding=PADDING,
            )
            for s in strategies
            for work in decode_works(s.sp)
        ),
        migrations=tuple(
            MigrationPoint(tp=tp, num_tokens=n, measured_s=measured(MIGRATION.seconds(n, LLAMA2_7B, tp)))
            for tp in (1, 2)
            for n in (16, 256, 4096, 65_536, 100_000)
        ),
    )


def decode_works(sp: int) -> list[DecodeWork]:
    return [
        DecodeWork(rows=(rows,) * masters, keys=(rows * masters * context,) * sp)
        for rows, context, masters in itertools.product((1, 3, 12, 50, 100), (50, 1000, 16_000), {1, sp})
    ]
