"""Move the plates of a site to the front of its axes, and back."""

import jax
import numpy as np

from numpyro_pvmc.program.structure import Latent, Structure


def _axes(latent: Latent, structure: Structure):
    """Axes of a site: those of plates, then other batch axes of more than one element, then those of the event."""
    border = len(latent.batch_shape)
    plates = [border + plate.dim for plate in structure.plates]
    others = [axis for axis in range(border) if axis not in plates and latent.batch_shape[axis] != 1]
    return plates + others + list(range(border, len(latent.shape)))


def tidy(x: jax.Array, latent: Latent, structure: Structure) -> jax.Array:
    """Move plates to the front of a site's axes, and drop batch axes of one element that are no plate.

    :param x: an array whose trailing axes are those that the model gives the site.
    :param latent: a site of the chain.
    :param structure: the structure of the chain.
    :return: an array of shape ``(..., *plates, *event)``; batch axes that are no plate count as event axes.
    """
    axes, leading = _axes(latent, structure), x.ndim - len(latent.shape)
    singletons = [leading + axis for axis in range(len(latent.shape)) if axis not in axes]
    order = [*range(leading), *(leading + axis for axis in axes), *singletons]
    return x.transpose(order).reshape(x.shape[:leading] + tuple(latent.shape[axis] for axis in axes))


def untidy(x: jax.Array, latent: Latent, structure: Structure) -> jax.Array:
    """Undo :func:`tidy`.

    :param x: an array of shape ``(..., *plates, *event)``.
    :param latent: a site of the chain.
    :param structure: the structure of the chain.
    :return: an array whose trailing axes are those that the model gives the site.
    """
    axes = _axes(latent, structure)
    leading = x.ndim - len(axes)
    order = [*range(leading), *(leading + int(position) for position in np.argsort(axes))]
    return x.transpose(order).reshape(x.shape[:leading] + latent.shape)
