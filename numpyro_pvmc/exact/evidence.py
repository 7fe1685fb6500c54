"""Compute the log evidence of a chain that has it in closed form, for gradients of any order."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_pvmc.chain import carried
from numpyro_pvmc.chain.chain import Chain, read_chain
from numpyro_pvmc.chain.linear_gaussian import check_linear_gaussian, matrices
from numpyro_pvmc.chain.potentials import enumerated
from numpyro_pvmc.ops import kalman
from numpyro_pvmc.ops.forward_backward import forward
from numpyro_pvmc.ops.full_precision import full_precision
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.program.compiled import ForEachModel, for_each_model
from numpyro_pvmc.program.structure import Structure, refuse_unlisted

_checked = ForEachModel()


def integrable(structure: Structure, model: Callable, arguments: Arguments, values: dict[str, Any]) -> Structure:
    """The structure of a chain that can be integrated out, in which discrete sites are summed; without sites if all are.

    Looked at once for each reading of a program.

    :raises ValueError: naming a site by which the chain is neither linear-Gaussian nor finite.
    """
    finite = structure.summing(structure.finite)
    if not finite.sites:
        return finite
    refuse_unlisted(finite.sites.values(), "and an exact posterior has no guide that samples it")
    checked = _checked.get(model, dict)
    if id(structure) not in checked:
        (carried.check_carried if structure.carried else check_linear_gaussian)(structure, model, arguments, values)
        checked[id(structure)] = structure  # which is kept, so that no other has its number
    return structure


def matrices_of(chain: Chain) -> tuple[kalman.Matrices, jax.Array | None, dict[str, jax.Array]]:
    """The matrices of a linear-Gaussian chain; see :func:`numpyro_pvmc.chain.linear_gaussian.matrices`."""
    return (carried.matrices if chain.structure.carried else matrices)(chain)


@for_each_model(static_argnum=1, name="the evidence")
@full_precision
def log_evidence(model: Callable, structure: Structure, arguments: Arguments, values: dict[str, Any]) -> jax.Array:
    """The log evidence of each series.

    :param structure: one that :func:`integrable` returns.
    :param values: of parameters and global sites.
    :return: shape ``(*plates)``; NaN where a distribution is none.
    """
    chain = read_chain(structure, model, arguments, values)
    if structure.sites:
        return kalman.log_evidence(matrices_of(chain)[0])
    potentials = enumerated(chain)
    if len(potentials.node) == 1:
        return jax.nn.logsumexp(potentials.node[0], -1)
    # Not the kernel, whose derivatives are written by hand, and in reverse mode only.
    return forward(potentials.node, potentials.edges, potentials.mask)[0] + jnp.zeros(
        [plate.size for plate in structure.plates]
    )
