"""Coefficients of eight A800 GPUs with Llama-2-7B, from the times that LoongServe's authors published.

Sources (milliseconds; SPs x TPt: s instances of t GPUs):

- Their figure 3's raw times of 512 x 1K, 128 x 5K, 64 x 10K, 16 x 50K, 4 x 100K and 1 x 500K tokens on SP1TP8, SP2TP4
  and SP4TP2. On SP4TP2 prefill took 5267, 7072, 7701, 15744, 11798, 53606, and decode with 4, 2, 2, 1, 1 and 1 masters
  42.3, 41.4, 40.1, 45.9, 28.9, 37.8.
- Single requests, prefill and decode: TP1, 10 tokens: 18.6 and 11.4; TP1, 1,000 tokens: 68.9 and 13.0; SP4TP2, 100
  tokens: 32.8 to 38.5 and 9.76 to 12.4.
- Their figure 2's ratios over TP1: 0.52, 0.28 and 0.165 for TP2, 4 and 8 and a prompt of 100K tokens; 0.57 for TP2 and
  10K.
- Their figure 13's ratios of 2 and 4 masters over one, for 1,024 x 10 tokens on SP4TP2: 0.63 and 0.46.

How the coefficients of T = A + B sum(len) + C sum(len^2) follow:

- C is attention, which all strategies spread evenly: 500K tokens on SP4TP2 give 1.93e-10 s on 8 GPUs, and 8 / (s t)
  times that elsewhere. TP2's ratio at 100K tokens says the same.
- B of SP4TP2 and TP8 are what figure 3 leaves: 1.02e-5 and 1.5e-5 s. TP2's is 3.0e-5 s, from its ratio at 10K tokens;
  the ring costs the rest: s instances take 3.0e-5 / s x (1 + 0.12 (s - 1)).
- A is 18 ms for one instance, and 5.3 ms for each one more.

Decode steps: 9.8 ms of launches and weights; 1.75e-7 s a key on an instance of TP2, a quarter on TP8; 3.6e-5 and
1.4e-5 s a row of a master; 4e-6 s a row of a group that exchanges, and 0.2 ms a master more. Keys move at 160 GB/s,
80 % of one direction of a GPU's NVLink.
"""

from __future__ import annotations

from loongjax.costmodel.decode_time import DecodeTime
from loongjax.costmodel.measurement import Provenance
from loongjax.costmodel.migration_time import MigrationTime
from loongjax.costmodel.model import FittedModel, StrategyTimes
from loongjax.costmodel.prefill_time import PaperPrefillTime
from loongjax.costmodel.work import Strategy
from loongjax_profiling.model_shapes import MODEL_SHAPES

_TOKEN_S = {2: 3.0e-5, 8: 1.5e-5}
"""B of one instance, by its GPUs."""
_SQUARED_TOKEN_S = 1.93e-10
"""C on eight GPUs."""
_KEY_S = {2: 1.75e-7, 8: 4.3e-8}
_ROW_S = {2: 3.6e-5, 8: 1.4e-5}
_MAX_INSTANCES = {2: 4, 8: 1}
"""What was measured: eight GPUs."""


def a800_model(max_instances: int | None = None) -> FittedModel:
    """The model for groups of TP2 and TP8 instances.

    Args:
        max_instances: the largest group; None: eight GPUs, as measured. Beyond that the forms above are extrapolated.
    """
    sizes = {tp: max_instances or most for tp, most in _MAX_INSTANCES.items()}
    return FittedModel(
        provenance=Provenance(
            hardware="8 x A800, coefficients derived from LoongServe's published times", model=MODEL_SHAPES["llama2-7b"]
        ),
        strategies={
            Strategy(sp, tp): StrategyTimes(paper_prefill=_prefill(sp, tp), decode=_decode(sp, tp))
            for tp, most in sizes.items()
            for sp in range(1, most + 1)
        },
        migration=MigrationTime(latency_s=1e-4, per_byte_s=1.0 / 160e9),
    )


def _prefill(sp: int, tp: int) -> PaperPrefillTime:
    return PaperPrefillTime(
        constant_s=0.018 + 0.0053 * (sp - 1),
        per_token_s=_TOKEN_S[tp] / sp * (1.0 + 0.12 * (sp - 1)),
        per_squared_token_s=_SQUARED_TOKEN_S * 8 / (sp * tp),
    )


def _decode(sp: int, tp: int) -> DecodeTime:
    exchanges = sp > 1
    return DecodeTime(
        constant_s=0.0098,
        per_padded_row_s=_ROW_S[tp],
        per_key_s=_KEY_S[tp],
        per_exchanged_row_s=4e-6 if exchanges else 0.0,
        per_extra_master_s=2e-4 if exchanges else 0.0,
        sp=sp,
        row_buckets=(),
    )
