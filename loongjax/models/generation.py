"""What a checkpoint says about ending and sampling a generation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loongjax.core.sampling import SamplingParams
from loongjax.errors import CheckpointError, RequestError
from loongjax.models.config import read_json_object

_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """From generation_config.json and config.json."""

    eos_token_ids: tuple[int, ...] = ()
    """Ids that end a generation, ascending: those of both files, which disagree in well-known checkpoints."""
    default_sampling: Mapping[str, float | int] = dataclasses.field(default_factory=dict)
    """Sampling parameters for requests that do not give their own, as far as generation_config.json names them.

    `do_sample` is not looked at, as in vLLM: a client of the OpenAI API who says nothing expects samples at the
    checkpoint's temperature, or 1; who wants greedy tokens asks for temperature 0.
    """

    @classmethod
    def from_checkpoint(cls, checkpoint_dir: Path | str) -> GenerationConfig:
        """Reads both files; generation_config.json may be absent.

        Raises:
            CheckpointError: a file that cannot be read, or a value that could not be a request's either.
        """
        folder = Path(checkpoint_dir)
        model = read_json_object(folder / "config.json")
        path = folder / "generation_config.json"
        generation = read_json_object(path) if path.exists() else {}
        eos = _token_ids(folder / "config.json", model) | _token_ids(path, generation)
        defaults = {name: generation[name] for name in _SAMPLING_FIELDS if generation.get(name) is not None}
        for name, value in defaults.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise CheckpointError(f"{path}: {name} must be a number, got {value!r}")
            if name == "top_k" and value != int(value):
                raise CheckpointError(f"{path}: top_k must be an integer, got {value!r}")
            defaults[name] = int(value) if name == "top_k" else float(value)
        try:
            SamplingParams(**defaults)
        except RequestError as error:
            raise CheckpointError(f"{path}: {error}") from None
        return cls(eos_token_ids=tuple(sorted(eos)), default_sampling=defaults)


def _token_ids(path: Path, raw: Mapping[str, Any]) -> set[int]:
    """`eos_token_id`, which is an id, a list of ids, or absent."""
    found = raw.get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if any(isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0 for token_id in ids):
        raise CheckpointError(f"{path}: eos_token_id must be a token id or a list of them, got {found!r}")
    return set(ids)
