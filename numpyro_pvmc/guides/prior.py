"""Draw states from the prior, for where a guide starts.

Global sites stand at their medians. Drawn with the states, a few of their draws decide everything: a tenth of the draws of an
autoregressive coefficient may be above 1, and after a hundred steps theirs are all the spread there is.
"""

import functools
from collections.abc import Callable

import jax
from jax import random
from numpyro.handlers import seed, substitute
from numpyro.infer import init_to_median

from numpyro_pvmc.chain.chain import Chain, read_chain
from numpyro_pvmc.chain.unconstrained import Coordinates, to_coordinates
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.program.compiled import BRIEFLY, for_each_model
from numpyro_pvmc.program.find_chain import capture
from numpyro_pvmc.program.handlers import run
from numpyro_pvmc.program.structure import Structure

_DRAWS = 255  # for a median


def _to_prior_median(site):
    return init_to_median(site, num_samples=_DRAWS) if site["value"] is None else None


def at_medians(chain: Chain) -> Chain:
    """The chain with its global sites at their medians under the prior, each given those before it.

    :param chain: the chain of the model; global sites among its values keep these.
    :return: the chain at values of all global sites.
    """
    structure = chain.structure
    if set(structure.global_sites) <= set(chain.values):
        return chain
    values = prior_medians(chain.model, structure, chain.arguments, chain.values)
    return read_chain(structure, chain.model, chain.arguments, values | chain.values, chain.gradient_scale)


@for_each_model(static_argnum=1, name="medians of the prior", options=BRIEFLY)
def prior_medians(
    model: Callable, structure: Structure, arguments: Arguments, values: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Medians of the global sites under their priors, each given those before it.

    :param values: of sites and parameters; global sites among them keep theirs.
    :return: ``{site: (*shape)}``.
    """
    placed = _placed(model, random.key(0), _to_prior_median, structure.global_sites)
    _, outside = capture(placed, arguments, values, structure)
    return {name: outside[name]["value"] for name in structure.global_sites}


def prior_coordinates(
    chain: Chain, coordinates: Coordinates, rng_key: jax.Array, number: int, strategy: Callable | None = None
) -> tuple[jax.Array | None, jax.Array]:
    """Coordinates of draws from the prior, given the values of the chain.

    :param chain: the chain of the model; global sites that are not among its values are drawn.
    :param number: how many draws.
    :param strategy: one of NumPyro's initialisation strategies to take values of the chain's sites from instead.
    :return: arrays of shape ``(number, N, *plates, D)``, for the initial step and for the steps; ``None`` for a chain without
        sites at its initial step.
    """

    def draw(rng_key):
        model = chain.model if strategy is None else _placed(chain.model, rng_key, strategy, chain.structure.sites)
        sites = run(model, chain.arguments, chain.values, rng_key)
        values = {name: sites[name]["value"] for name in chain.structure.sites}
        initial = to_coordinates(coordinates.initial, values)[None] if coordinates.initial else None
        return initial, to_coordinates(coordinates.steps, values)

    return jax.vmap(draw)(random.split(rng_key, number))


def _placed(model, rng_key, strategy, names):
    """The model with some of its sites where a strategy puts them, which may draw."""
    place = functools.partial(_of_strategy, strategy, frozenset(names))
    return substitute(seed(model, rng_key), substitute_fn=place)


def _of_strategy(strategy, names, site):
    return strategy(site) if site["name"] in names else None
