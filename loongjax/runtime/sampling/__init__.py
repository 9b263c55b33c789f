"""Sampling on the devices: from a step's logits to its tokens."""

from loongjax.runtime.sampling.logprobs import LogprobArrays as LogprobArrays
from loongjax.runtime.sampling.program import build_counts as build_counts
from loongjax.runtime.sampling.program import sample_step as sample_step
from loongjax.runtime.sampling.prompt_logprobs import prompt_logprobs as prompt_logprobs
from loongjax.runtime.sampling.rows import SamplerRows as SamplerRows
from loongjax.runtime.sampling.rows import build_rows as build_rows
from loongjax.runtime.sampling.variant import TIERS as TIERS
from loongjax.runtime.sampling.variant import SamplerInput as SamplerInput
from loongjax.runtime.sampling.variant import SamplerVariant as SamplerVariant
