"""KV retention (proactive scale-down of LoongServe, section 4.1): keys stay where the ring carries them past."""

from jaxtyping import Array, Float, Int32

from loongjax.pallas_kernels import kv_update


def retain(
    kv_pool: Float[Array, "L 2 P page_size K H"],
    layer: Int32[Array, ""],
    kept_slots: Int32[Array, "n T"],
    source_rank: Int32[Array, ""],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
) -> Float[Array, "L 2 P page_size K H"]:
    """The pool with those tokens of a passing block written that this instance keeps.

    To be called by the `visit` of `ring_attention`, with the pool as its carry:

        visit = lambda source_rank, k, v, pool: retain(pool, layer, kept_slots, source_rank, k, v)

    Args:
        kv_pool: this instance's pool.
        layer: which layer.
        kept_slots: for every token of every rank, by rank and local index, the slot on this instance that will hold
            it; -1 if this instance does not keep it.
        source_rank: whose block this is.
        k: that rank's keys.
        v: that rank's values.

    Raises:
        ValueError: what `kv_update` raises.
    """
    return kv_update(kv_pool, k, v, layer, kept_slots[source_rank])
