"""Programs that would be misread, if reading a carry went by less than it does: refused, or right."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpy.testing import assert_allclose
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from numpyro_pvmc.exact import exact_posterior, marginalize

Y = jnp.asarray(np.random.default_rng(0).normal(size=4), jnp.float32)
NONE = jnp.zeros(3)
PANEL = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)


def gain_since_the_start(y):
    def step(carry, _):
        x, position = carry
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        return (x, position + x), position + x

    first = numpyro.sample("first", dist.Normal(0.0, 1.0))
    _, positions = scan(step, (first, first), None, length=len(y))
    numpyro.sample("y", dist.Normal(positions - first, 0.3), obs=y)


def lagged(start=lambda x: NONE, in_step=lambda lag, t: lag, out=lambda lag: lag):
    """A lag of three steps, of three series."""

    def model(y):
        series = numpyro.plate("series", 3)

        def step(carry, inputs):
            (x, *lags), (y_t, t) = carry, inputs
            with series:
                new = numpyro.sample("x", dist.Normal(0.5 * x, 1.0))
                numpyro.sample("y", dist.Normal(new + in_step(lags[0], t), 0.5), obs=y_t)
            return (new, *lags[1:], new), out(lags[0])

        with series:
            first = numpyro.sample("first", dist.Normal(NONE, 1.0))
        _, lags = scan(step, (first, NONE, NONE, start(first)), (y, jnp.arange(4)))
        with series:
            numpyro.sample("later", dist.Normal(lags, 1.0), obs=y)

    return model


def masked_start(y):
    with handlers.mask(mask=False):
        first = numpyro.sample("first", dist.Normal(0.0, 1.0))

    def step(carry, y_t):
        x, position = carry
        x = numpyro.sample("x", dist.Normal(x, 1.0))
        numpyro.sample("y", dist.Normal(position + x, 0.5), obs=y_t)
        return (x, position + x), None

    scan(step, (first, first), y)


def read_where_masked(y):
    def step(carry, inputs):
        (x, position), (y_t, mask_t) = carry, inputs
        with handlers.mask(mask=mask_t):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
            numpyro.sample("y", dist.Normal(position + x, 0.3), obs=y_t)
        return (x, position + x), None

    scan(step, (0.0, 0.0), (y, jnp.array([True, True, False, True])))


def site_of_a_masked_site(y):
    def step(carry, inputs):
        (one, two), (y_t, mask_t) = carry, inputs
        kept = numpyro.sample("kept", dist.Delta(one))
        with handlers.mask(mask=mask_t):
            a = numpyro.sample("a", dist.Normal(0.9 * one, 0.5))
        b = numpyro.sample("b", dist.Normal(a + 0.3 * two, 0.5))
        numpyro.sample("y", dist.Normal(b + kept, 0.3), obs=y_t)
        return (b, b), None

    scan(step, (0.0, 0.0), (y, jnp.array([True, True, False, True])))


def complex_carry(y):
    def step(z, y_t):
        z = z * (0.9 * jnp.exp(0.7j)) + numpyro.sample("x", dist.Normal(0.0, 0.5))
        numpyro.sample("y", dist.Normal(z.real, 0.3), obs=y_t)
        return z, None

    scan(step, jnp.zeros((), jnp.complex64), y)


def weighted_delta(y):
    def step(carry, y_t):
        position, x = carry
        position = numpyro.sample("position", dist.Delta(position + x, log_density=1.5))
        x = numpyro.sample("x", dist.Normal(x, 1.0))
        numpyro.sample("y", dist.Normal(position, 1.0), obs=y_t)
        return (position, x), None

    scan(step, (0.0, 0.0), y)


@pytest.mark.parametrize(
    ("model", "y", "message"),
    [
        (gain_since_the_start, Y, "Site 'y' after the scan mixes times"),
        (lagged(start=lambda x: x[::-1]), PANEL, r"'series'.* read each other"),
        (lagged(in_step=lambda lag, t: jnp.where(t == 3, lag[::-1], lag)), PANEL, r"'series'.* read each other"),
        (lagged(out=lambda lag: lag[::-1]), PANEL, r"'series'.* read each other"),
        (masked_start, Y, "Latent site 'first' is masked"),
        (read_where_masked, Y, "The log evidence is nan|masked"),
        (site_of_a_masked_site, Y, "nan|masked"),
        (complex_carry, Y, "The carry of the scan has complex numbers"),
        (weighted_delta, Y, "nan|not a number"),
    ],
)
def test_refused(model, y, message):
    with pytest.raises(ValueError, match=message):
        exact_posterior(model, {}, y)


def test_the_lag_alone_is_accepted():
    assert jnp.isfinite(exact_posterior(lagged(), {}, PANEL).log_normalizer).all()


@pytest.mark.parametrize("model", [masked_start, read_where_masked, site_of_a_masked_site, weighted_delta])
def test_no_number_where_it_cannot_be_refused(model):
    """Masks are numbers: inside of a compiled function they are not looked at."""

    @jax.jit
    def factor(y):
        with handlers.trace() as sites:
            marginalize(model)(y)
        (found,) = (site["fn"].log_factor for name, site in sites.items() if name.endswith("_log_evidence"))
        return found, exact_posterior(model, {}, y).log_normalizer

    marginal, posterior = factor(Y)
    assert marginal == -jnp.inf
    assert jnp.isnan(posterior)


def test_marginalized_programs_look_at_data_that_are_there():
    def unheld(y, mask):
        def step(x, inputs):
            y_t, mask_t = inputs
            with handlers.mask(mask=mask_t):
                x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
                numpyro.sample("y", dist.Normal(x, 0.3), obs=y_t)
            return x, None

        scan(step, 0.0, (y, mask))

    with pytest.raises(ValueError, match="masked at some steps and unmasked at a later one"):
        marginalize(unheld)(Y, jnp.array([True, False, True, True]))


def test_a_gradient_where_covariances_are_of_no_use(x64):
    def sum_and_part(y, size):
        def step(carry, y_t):
            a = numpyro.sample("a", dist.Normal(0.0, size))
            b = numpyro.sample("b", dist.Normal(0.0, 1e-5))
            numpyro.sample("sum", dist.Delta(a + b), obs=y_t[0])
            numpyro.sample("part", dist.Delta(a), obs=y_t[1])
            return carry, None

        scan(step, 0.0, y)

    y = jnp.array([[0.3 + 2e-5, 0.3]])

    def factor(size):
        with handlers.trace() as sites:
            marginalize(sum_and_part)(y, size)
        return sites["a_log_evidence"]["fn"].log_factor

    assert_allclose(jax.grad(factor)(1e5), (factor(1e5 * (1 + 1e-4)) - factor(1e5 * (1 - 1e-4))) / 20.0, rtol=1e-4)
