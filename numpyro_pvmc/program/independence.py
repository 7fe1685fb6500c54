"""Refuse a chain whose series, or times, read each other where they must be independent."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import random

from numpyro_pvmc.jaxprs.dependence import mixes_rows
from numpyro_pvmc.program.arguments import Arguments
from numpyro_pvmc.program.find_chain import capture, first, stacked_zeros, unknown, with_carry_dtypes
from numpyro_pvmc.program.handlers import log_prob, run, run_body
from numpyro_pvmc.program.structure import Structure, per_series, time_rows


def check_independence(structure: Structure, model: Callable, arguments: Arguments, values: dict[str, Any]) -> None:
    """Refuse series that read each other, and emissions after the scan that read other times.

    :raises ValueError: naming the site that reads what it must not.
    """
    one = {name: jnp.zeros(site.shape, site.dtype) for name, site in structure.sites.items()}
    for number, plate in enumerate(structure.plates):
        axis = {name: len(site.batch_shape) + plate.dim for name, site in structure.sites.items()}
        rows = {name: jnp.moveaxis(value, axis[name], 0) for name, value in one.items()}

        def by_series(rows, values, arguments, axis=axis, number=number):
            before, now = ({name: jnp.moveaxis(x, 0, axis[name]) for name, x in part.items()} for part in rows)
            densities = _two_steps(structure, model, arguments, values, before, now)
            return {name: jnp.moveaxis(density, number, 0) for name, density in densities.items()}

        mixed, strange = mixes_rows(by_series, (rows, rows), values, arguments)
        for name, is_mixed in mixed.items():
            if is_mixed:
                raise ValueError(
                    f"Site '{name}' lets the elements of plate '{plate.name}' read each other. The plate encloses all latent "
                    "sites of the chain, which makes its elements independent series. Leave the plate out (the chain is then "
                    "one series with a vector state, `.to_event(1)`), or remove the dependence." + _because_of(strange)
                )
    if structure.later_factors:
        rows = {name: value[None].repeat(structure.length + 1, 0) for name, value in one.items()}
        after = _after_scan
        if structure.carried:  # what the scan puts out reads all steps before
            rows, after = (rows, _outputs(structure, model, arguments, values)), _after_outputs

        def by_time(rows, values, arguments):
            return after(structure, model, arguments, values, rows)

        mixed, strange = mixes_rows(by_time, rows, values, arguments)
        for name, is_mixed in mixed.items():
            if is_mixed:
                raise ValueError(
                    f"Site '{name}' after the scan mixes times: its row for one time reads the state of another. Observe it "
                    "inside the body of the scan, where it may read the state before and after the step." + _because_of(strange)
                )


def _because_of(strange):
    if not strange:
        return ""
    return (
        f" (The model applies {sorted(strange)} to the states, of which it is not known which element of the result reads "
        "which of the input: it counts as if each read all. Under `jax.vmap` over the plate, or written with operations of "
        "JAX, it can be told.)"
    )


def _two_steps(structure, model, arguments, values, before, now):
    """Log densities by series of a chain of the initial sites and two steps, and of sites after the scan."""
    densities = {}

    def at_scan(index, scan):
        if index != structure.scan_index:
            return None
        scan = with_carry_dtypes(scan, structure.carry_dtypes)
        carry, x = unknown(scan.init), unknown(first(scan.xs))
        for latent in (before, now):
            latent = {name: latent[name] for name in structure.step}
            carry, output, sites = run_body(scan, 0, carry, x, latent, structure.length)
            for name in (*structure.node_factors, *structure.edge_factors):
                densities[name] = densities.get(name, 0.0) + per_series(log_prob(sites[name]), structure.plates)
        return carry, jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * structure.length), output), {}

    initial = {name: before[name] for name in structure.initial}
    sites = run(model, arguments, {**values, **initial}, random.key(0), at_scan)
    for name in (*structure.initial, *structure.initial_factors):
        densities[name] = per_series(log_prob(sites[name]), structure.plates)
    for name in structure.later_factors:
        densities[name] = time_rows(sites[name], structure.length, structure.plates).sum(0)
    return densities


def _after_scan(structure, model, arguments, values, rows):
    """Log densities by time of sites after the scan, for a trajectory whose row 0 is that of the initial sites."""

    def at_scan(index, scan):
        if index != structure.scan_index:
            return None
        steps = {name: rows[name][1:] for name in structure.step}
        scan = with_carry_dtypes(scan, structure.carry_dtypes)
        carry, x = unknown(scan.init), unknown(first(scan.xs))
        output = lambda latent: run_body(scan, 0, carry, x, latent, structure.length)[1]
        return carry, jax.vmap(output)(steps), {}

    initial = {name: rows[name][0] for name in structure.initial}
    sites = run(model, arguments, {**values, **initial}, random.key(0), at_scan)
    return _by_time(sites, structure)


def _outputs(structure, model, arguments, values):
    """Outputs of the scan, as zeros."""

    def one(arguments, values):
        scan, _ = capture(model, arguments, values, structure)
        return run_body(scan, 0, scan.init, first(scan.xs), {}, structure.length)[1]

    return stacked_zeros(jax.eval_shape(one, arguments, values), structure.length + 1)


def _after_outputs(structure, model, arguments, values, rows):
    """The same, for outputs of the scan, of which row 0 is no step's, and initial sites, which have that row."""
    of_sites, outputs = rows
    initial = {name: of_sites[name][0] for name in structure.initial}
    after = jax.tree.map(lambda rows: rows[1:], outputs)
    at_scan = lambda index, scan: (scan.init, after, {}) if index == structure.scan_index else None
    return _by_time(run(model, arguments, {**values, **initial}, random.key(0), at_scan), structure)


def _by_time(sites, structure):
    by_time = {name: time_rows(sites[name], structure.length, ()) for name in structure.later_factors}
    return {
        name: jnp.concatenate([jnp.zeros_like(x[:1])] * (structure.length + 1 - len(x)) + [x]) for name, x in by_time.items()
    }
