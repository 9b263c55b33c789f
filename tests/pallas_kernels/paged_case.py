"""Random paged pools in which everything that a table does not name is poisoned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

JUNK_ENTRIES = (np.iinfo(np.int32).max, np.iinfo(np.int32).min, -1, 10**6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedCase:
    """A pool whose unnamed slots are NaN, tables whose unnamed entries are junk, and each request's keys."""

    kv_pool: np.ndarray
    layer: int
    page_indices: np.ndarray
    page_starts: np.ndarray
    kv_lens: np.ndarray
    keys: list[np.ndarray]
    """[kv_len, K, H] of each request."""
    values: list[np.ndarray]

    @property
    def arguments(self) -> tuple[jax.Array, ...]:
        """What comes after the queries in the ops' signatures."""
        host = (self.kv_pool, np.int32(self.layer), self.page_indices, self.page_starts, self.kv_lens)
        return tuple(jnp.asarray(x) for x in host)


def make_case(
    seed: int,
    kv_lens: list[int],
    *,
    page_size: int,
    heads: tuple[int, int] = (2, 16),
    dtype: str = "float32",
    num_pages: int | None = None,
    num_entries: int | None = None,
    num_layers: int = 2,
) -> PagedCase:
    """Requests of these lengths, on randomly permuted pages, their tables in random order with slack between."""
    rng = np.random.default_rng(seed)
    pages_of = [-(-kv_len // page_size) for kv_len in kv_lens]
    num_pages = sum(pages_of) + 3 if num_pages is None else num_pages
    num_entries = sum(pages_of) + 2 * len(kv_lens) + 1 if num_entries is None else num_entries
    layer = int(rng.integers(num_layers))
    pool = np.full((num_layers, 2, num_pages, page_size, *heads), np.nan, jnp.dtype(dtype))
    page_indices = rng.choice(np.array(JUNK_ENTRIES, np.int32), num_entries)
    page_starts = rng.choice(np.array(JUNK_ENTRIES, np.int32), len(kv_lens))
    free_pages = list(rng.permutation(num_pages))
    keys, values = ([np.zeros(0)] * len(kv_lens) for _ in range(2))
    entry = 0
    for request in rng.permutation(len(kv_lens)):
        entry += int(rng.integers(3))
        pages = [free_pages.pop() for _ in range(pages_of[request])]
        if pages:
            page_starts[request] = entry
        page_indices[entry : entry + len(pages)] = pages
        entry += len(pages)
        kv = np.asarray(jnp.asarray(rng.standard_normal((2, kv_lens[request], *heads)), dtype))
        keys[request], values[request] = kv
        for token in range(kv_lens[request]):
            pool[layer, :, pages[token // page_size], token % page_size] = kv[:, token]
    return PagedCase(
        kv_pool=pool,
        layer=layer,
        page_indices=page_indices,
        page_starts=page_starts,
        kv_lens=np.array(kv_lens, np.int32),
        keys=keys,
        values=values,
    )


def random_queries(seed: int, num_rows: int, num_q_heads: int, head_dim: int, dtype: str = "float32") -> jax.Array:
    """[num_rows, N, H], standard normal."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal((num_rows, num_q_heads, head_dim)), dtype)
