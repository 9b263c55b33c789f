import pytest

from loongjax.errors import ConfigError
from loongjax.scheduler.baselines.batching_config import BatchingConfig


@pytest.mark.parametrize("fields", [{"watermark": 1.0}, {"watermark": -0.1}, {"min_decodes": -1}, {"max_prefills": 0}])
def test_batching_that_cannot_work_is_refused(fields: dict[str, float]):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        BatchingConfig(reserves_max_tokens=True, **fields)  # pyright: ignore[reportArgumentType]
