"""Meshes over arbitrary subsets of the eight virtual devices."""

import jax
import numpy as np
from jax.sharding import Mesh

DEVICES = {
    1: (3,),
    2: (1, 6),
    3: (1, 4, 6),
    4: (0, 2, 5, 7),
    5: (0, 2, 3, 5, 7),
    6: (0, 1, 2, 4, 5, 7),
    7: (0, 1, 2, 3, 5, 6, 7),
    8: (0, 1, 2, 3, 4, 5, 6, 7),
}
AXIS = "ring"
"""Not the name that the engine gives its axis."""


def mesh_of(num_ranks: int) -> Mesh:
    return Mesh(np.array(jax.devices())[list(DEVICES[num_ranks])], (AXIS,))
