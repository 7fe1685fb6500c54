"""Map a series of features to a series of outputs.

Needs Flax: ``pip install numpyro_pvmc[networks]``. A row of zeros stands for a time of which nothing is known, be it missing
or beyond the ends of the series; so the networks here surround a series with such rows, and meet nothing new at its ends.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(
        "`numpyro_pvmc.networks` is built of modules of the package `flax`, which could not be imported. Install it with "
        '`pip install "numpyro_pvmc[networks]"`.'
    ) from error

# The output is zero at first: a guide then starts from its model's prior.
_AT_ZERO = nnx.initializers.zeros_init()


class Convolutions(NamedTuple):
    """Convolutions over time, each followed by a rectifier, and a linear layer on top.

    Each output reads ``len(channels) * (width - 1) + 1`` rows around its own. This is the network of the linear-Gaussian
    experiment of Brady, Nüsken & Li (ICML 2026), except at the ends of a series, where theirs has layers of their own.

    :param channels: channels of the hidden layers.
    :param width: how many neighbouring rows a layer reads.

    .. doctest::

        >>> import jax
        >>> from numpyro_pvmc.networks import Convolutions
        >>> network = Convolutions(channels=(8, 8), width=5)(in_features=3, out_features=2, rng_key=jax.random.key(0))
        >>> network(jax.numpy.ones((100, 3))).shape
        (100, 2)
    """

    channels: tuple[int, ...] = (16, 16, 16)
    width: int = 7

    def __call__(self, in_features: int, out_features: int, rng_key: jax.Array) -> nnx.Module:
        """Build the network.

        :param in_features: number of features, E.
        :param out_features: number of outputs.
        :param rng_key: random key.
        :return: maps ``(T, E)`` to ``(T, out_features)``, for any T.
        """
        return _Convolutions(self, in_features, out_features, nnx.Rngs(rng_key))


class Recurrent(NamedTuple):
    """Gated recurrent units that run over the series forwards and backwards, and a linear layer on top.

    Each output reads the whole series.

    :param features: number of units in each direction.
    """

    features: int = 32

    def __call__(self, in_features: int, out_features: int, rng_key: jax.Array) -> nnx.Module:
        """Build the network.

        :param in_features: number of features, E.
        :param out_features: number of outputs.
        :param rng_key: random key.
        :return: maps ``(T, E)`` to ``(T, out_features)``, for any T.
        """
        return _Recurrent(self, in_features, out_features, nnx.Rngs(rng_key))


class _Convolutions(nnx.Module):
    def __init__(self, recipe, in_features, out_features, rngs):
        sizes = (in_features, *recipe.channels)
        self.beyond = len(recipe.channels) * (recipe.width - 1)
        self.hidden = nnx.List(
            nnx.Conv(before, after, kernel_size=(recipe.width,), padding="VALID", rngs=rngs)
            for before, after in itertools.pairwise(sizes)
        )
        self.output = nnx.Linear(sizes[-1], out_features, kernel_init=_AT_ZERO, rngs=rngs)

    def __call__(self, x):
        # Padded once: were each layer padded by itself, its bias would be missing there, and the ends be a case apart.
        x = jnp.pad(x, ((self.beyond // 2, self.beyond - self.beyond // 2), (0, 0)))
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        return self.output(x)


class _Recurrent(nnx.Module):
    def __init__(self, recipe, in_features, out_features, rngs):
        run = lambda: nnx.RNN(nnx.GRUCell(in_features, recipe.features, rngs=rngs), rngs=rngs)
        self.hidden = nnx.Bidirectional(run(), run(), rngs=rngs)
        self.output = nnx.Linear(2 * recipe.features, out_features, kernel_init=_AT_ZERO, rngs=rngs)

    def __call__(self, x):
        return self.output(self.hidden(x))
