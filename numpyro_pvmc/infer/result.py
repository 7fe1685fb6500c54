"""Show what a run returns in a few lines."""

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.svi import SVIRunResult

from numpyro_pvmc.program.arguments import is_traced

_MOST = 10  # names of parameters that are shown


class RunResult(SVIRunResult):
    """What a run returns: `params`, `state` and `losses`, as from :meth:`numpyro.infer.SVI.run`."""

    __slots__ = ()

    def __repr__(self):
        shown = [f"'{name}' {_shapes(value)}" for name, value in self.params.items()]
        params = ", ".join([*shown[:_MOST], *([f"{len(shown) - _MOST} more"] if len(shown) > _MOST else [])])
        size, losses = jnp.size(self.losses), "losses not known yet"
        if not is_traced(self.losses) and size:
            window = max(size // 10, 1)
            first, last = (np.asarray(self.losses[part]).mean() for part in (slice(window), slice(-window, None)))
            losses = f"mean loss {last:.6g} over the last {window}, {first:.6g} over the first"
        return f"RunResult of {size} updates: {losses}\n  parameters and mutable state: {params or 'none'}"


def _shapes(value):
    leaves = jax.tree.leaves(value)
    return jnp.shape(leaves[0]) if len(leaves) == 1 else f"{sum(map(jnp.size, leaves))} numbers in {len(leaves)} arrays"
