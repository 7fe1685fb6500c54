"""The same model and guide objects under NumPyro's own inference."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpy.testing import assert_allclose
from numpyro.contrib.control_flow import scan
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from conftest import few_particles
from numpyro_pvmc import PVMC, ImportanceSmoothedELBO, markov

pytestmark = few_particles

Y = jnp.array([[0.3, 1.0], [-0.2, 0.5], [0.8, -0.9], [0.1, 0.4], [1.1, 0.0]])


def model(y=None, T=None):
    """Two series, a parameter, a prior on another, and a derived site."""
    a = numpyro.param("a", 0.5, constraint=dist.constraints.unit_interval)
    sigma = numpyro.sample("sigma", dist.LogNormal(-0.5, 0.3))
    series = numpyro.plate("series", 2)

    def step(x_prev, y_t):
        with series:
            x = numpyro.sample("x", dist.Normal(a * x_prev, sigma))
            numpyro.deterministic("level", 10 * x)
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, x

    with series:
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    markov(step, x_0, y, length=T)


@pytest.mark.slow
def test_svi_takes_the_objective_and_equals_pvmc_step_by_step():
    guide = AutoNormal(model)
    stock = SVI(model, guide, optax.adam(0.05), loss=ImportanceSmoothedELBO(num_particles=4))
    ours = PVMC(model, guide, optax.adam(0.05), num_particles=4)
    states = [svi.init(jax.random.key(1), Y) for svi in (stock, ours)]
    update = jax.jit(stock.update)
    for _ in range(3):
        (theirs, their_loss), (own, own_loss) = update(states[0], Y), ours.update(states[1], Y)
        assert_allclose(own_loss, their_loss, rtol=1e-5)
        states = [theirs, own]
    for name, value in stock.get_params(states[0]).items():
        assert_allclose(ours.get_params(states[1])[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["evaluate", "stable_update"])
def test_other_methods_equal_those_of_svi(method):
    guide = AutoNormal(model)
    stock = SVI(model, guide, optax.adam(0.05), loss=ImportanceSmoothedELBO(num_particles=4))
    ours = PVMC(model, guide, optax.adam(0.05), num_particles=4)
    found = [jax.tree.leaves(getattr(svi, method)(svi.init(jax.random.key(1), Y), Y))[-1] for svi in (ours, stock)]
    assert_allclose(found[0], found[1], rtol=1e-5)


def test_run_without_growth_equals_svi():
    guide = AutoNormal(model)
    stock = SVI(model, guide, optax.adam(0.05), loss=ImportanceSmoothedELBO(num_particles=4))
    theirs = stock.run(jax.random.key(1), 120, Y, progress_bar=False)
    ours = PVMC(model, guide, optax.adam(0.05), num_particles=4).run(jax.random.key(1), 120, Y, progress_bar=False, grow=False)
    assert isinstance(ours, type(theirs))  # shown in a few lines, and else the same
    assert ours._fields == theirs._fields
    assert ours.losses.shape == (120,)
    assert_allclose(ours.losses, theirs.losses, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_one_particle_is_trace_elbo_on_the_same_draws(x64):
    guide = AutoNormal(model)
    svi = SVI(model, guide, optax.adam(0.05), loss=Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(1), Y))
    losses = Trace_ELBO(), ImportanceSmoothedELBO(1, gradient="reparam")
    values = [
        jax.jit(jax.value_and_grad(lambda p, loss=loss: loss.loss(jax.random.key(2), p, model, guide, Y)))(params)
        for loss in losses
    ]
    assert_allclose(values[1][0], values[0][0], rtol=1e-10)
    for name, slope in values[0][1].items():
        assert_allclose(values[1][1][name], slope, rtol=1e-8, atol=1e-8)


def test_predictive_runs():
    assert Predictive(model, num_samples=7)(jax.random.key(0), T=9)["y"].shape == (7, 9, 2)


@pytest.mark.slow
def test_trace_elbo_and_nuts_run():
    guide = AutoNormal(model)
    result = SVI(model, guide, optax.adam(0.05), loss=Trace_ELBO()).run(jax.random.key(0), 50, Y, progress_bar=False)
    assert np.isfinite(result.losses).all()

    mcmc = MCMC(NUTS(model), num_warmup=50, num_samples=50, progress_bar=False)
    mcmc.run(jax.random.key(0), Y)
    assert mcmc.get_samples()["x"].shape == (50, 5, 2)


@pytest.mark.slow
def test_predictive_takes_the_posterior_samples():
    pvmc = PVMC(model, AutoNormal(model), num_particles=4)
    result = pvmc.run(jax.random.key(0), 50, Y, progress_bar=False)
    samples = pvmc.sample_posterior(jax.random.key(1), result.params, Y, sample_shape=(6,))
    shapes = {name: value.shape for name, value in samples.items()}
    assert shapes == {"x_0": (6, 2), "x": (6, 5, 2), "sigma": (6,), "level": (6, 5, 2)}
    assert len(np.unique(samples["sigma"])) == 6
    forecast = Predictive(model, samples, params=result.params)(jax.random.key(2), T=8)
    assert forecast["y"].shape == (6, 8, 2)
    assert_allclose(forecast["level"][:, :5], samples["level"], rtol=1e-6)


# NumPyro asks for the shape of every value in the guide's trace, also of a module.
@pytest.mark.filterwarnings("ignore:shape requires ndarray or scalar arguments:DeprecationWarning")
@pytest.mark.parametrize("library", ["nnx", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flax", "equinox"))])
def test_networks_in_model_and_guide(library):
    network = {"flax": flax_network, "nnx": nnx_network, "equinox": equinox_network}[library]()

    def model(y):
        drift = network("drift", 2)

        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(x_prev + 0.1 * drift(x_prev), 0.5).to_event(1))
            numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y_t)
            return x, None

        scan(step, jnp.zeros(2), y)

    def guide(y):
        encode = network("encode", 2)
        numpyro.sample("x", dist.Normal(jax.vmap(encode)(y), 0.5).to_event(1))

    pvmc = PVMC(model, guide, num_particles=4)
    result = pvmc.run(jax.random.key(0), 30, Y, progress_bar=False)
    assert np.isfinite(result.losses).all()
    assert np.mean(result.losses[-5:]) < np.mean(result.losses[:5])
    assert pvmc.posterior(jax.random.key(1), result.params, Y).mean()["x"].shape == (5, 2)


def flax_network():
    linen = pytest.importorskip("flax.linen")
    from numpyro.contrib.module import flax_module

    return lambda name, size: flax_module(name, linen.Dense(size), input_shape=(size,))


def nnx_network():
    nnx = pytest.importorskip("flax.nnx")
    from numpyro.contrib.module import nnx_module

    linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    return lambda name, size: nnx_module(name, linear)


def equinox_network():
    equinox = pytest.importorskip("equinox")
    from numpyro.contrib.module import eqx_module

    linear = equinox.nn.Linear(2, 2, key=jax.random.key(0))
    return lambda name, size: eqx_module(name, linear)
