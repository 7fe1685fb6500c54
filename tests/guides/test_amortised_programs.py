"""Amortised guides: what the network reads, in which units it answers, which networks and programs it takes."""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from jax import random
from numpy.testing import assert_allclose, assert_array_equal
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoGuideList, AutoNormal

from autoregressions import SMALL, A, Q, R, initialised, model, simulate, trained
from conftest import few_particles
from models import BY_NAME
from numpyro_pvmc import PVMC, AutoAmortisedNormal, ImportanceSmoothedELBO
from numpyro_pvmc.chain.chain import read_chain
from numpyro_pvmc.chain.observations import observations
from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.guides.gaussian import read_proposal
from numpyro_pvmc.networks import Convolutions, Recurrent
from numpyro_pvmc.program.arguments import Arguments

pytestmark = few_particles


def values_of(program, *args):
    structure = read_structure(program, Arguments(args), {})
    values, present = observations(read_chain(structure, program, Arguments(args), {}))
    assert_array_equal(values[~present], 0.0)
    return np.where(present, values, np.nan)


@pytest.mark.slow
def test_units_are_those_of_the_prior_and_the_data():
    """The same seed on the same data, a thousand times as large around a level of 10,000, does the same."""

    def far(y):
        series = numpyro.plate("series", y.shape[1])

        def step(x_prev, y_t):
            with series:
                x = numpyro.sample("x", dist.Normal(1e4 + A * (x_prev - 1e4), 1e3 * Q**0.5))
                numpyro.sample("y", dist.Normal(x, 1e3 * R**0.5), obs=y_t)
            return x, None

        with series:
            x_0 = numpyro.sample("x_0", dist.Normal(1e4, 1e3))
        scan(step, x_0, y)

    y = jnp.asarray(simulate(0, 20, 4), jnp.float32)
    near_guide, _, near = trained(model, y, steps=50)
    far_guide, _, away = trained(far, 1e4 + 1e3 * y, steps=50)
    near_median = near_guide.median(near, y)["x"]
    assert np.std(near_median) > 0.2
    assert_allclose((far_guide.median(away, 1e4 + 1e3 * y)["x"] - 1e4) / 1e3, near_median, atol=0.05)
    # They are those of the first data: other data are read in the same units.
    moved = near_guide.median(near, y + 100.0)["x"]
    assert np.mean(moved - near_median) > 1.0


def test_what_is_read():
    first = BY_NAME["first_observed"]
    (y,) = first.args
    assert_allclose(values_of(first.model, y)[:, 0], y, rtol=1e-6)
    y, present = BY_NAME["padded"].args
    assert_allclose(values_of(BY_NAME["padded"].model, y, present)[1:, :, 0], np.where(present, y, np.nan), rtol=1e-6)
    # A mask hides what is a number, too.
    read = values_of(BY_NAME["padded"].model, np.nan_to_num(y, nan=7.0), present)
    assert_array_equal(np.isnan(read[1:, :, 0]), ~present)
    (y,) = BY_NAME["after_the_scan_with_first"].args
    assert_allclose(values_of(BY_NAME["after_the_scan_with_first"].model, y)[:, 0], y, rtol=1e-6)


@pytest.mark.slow
def test_what_is_read_in_the_scan_and_after_it():
    (y,) = BY_NAME["series"].args
    assert_allclose(values_of(BY_NAME["series"].model, y)[1:, :, 0], y, rtol=1e-6)
    assert np.isnan(values_of(BY_NAME["series"].model, y)[0]).all()
    for name in ("after_the_scan", "after_the_scan_as_event", "after_the_scan_in_plates"):
        (y,), length = BY_NAME[name].args, BY_NAME[name].length
        assert_allclose(values_of(BY_NAME[name].model, y)[1:, ..., 0], y[-length:], rtol=1e-6)


@pytest.mark.slow
def test_what_is_read_of_two_plates_and_batches_between_them():
    def program(y, z):
        rows, columns = numpyro.plate("rows", 2, dim=-3), numpyro.plate("columns", 3, dim=-1)

        def step(x_prev, inputs):
            y_t, z_t = inputs
            with rows, columns:
                x = numpyro.sample("x", dist.Normal(x_prev, 1.0))
                with numpyro.plate("sensors", 4, dim=-2), handlers.mask(mask=~jnp.isnan(y_t)):
                    numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
                numpyro.sample("z", dist.Normal(x[..., None], 1.0).expand([2, 1, 3, 2]).to_event(1), obs=z_t)
            return x, None

        with rows, columns:
            x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        scan(step, x_0, (y, z))

    rng = np.random.default_rng(0)
    y, z = rng.normal(size=(5, 2, 4, 3)).astype(np.float32), rng.normal(size=(5, 2, 1, 3, 2)).astype(np.float32)
    y[2, 1, 3, 0] = np.nan
    read = values_of(program, y, z)
    assert_array_equal(read[1:, ..., :4], np.moveaxis(y, 2, -1))
    assert_array_equal(read[1:, ..., 4:], z[:, :, 0])
    guide, params = initialised(program, y, z)
    assert params["auto_features"].shape == (2, 6)
    assert guide.median(params, y, z)["x"].shape == (5, 2, 1, 3)


class Flax(nnx.Module):
    def __init__(self, in_features, out_features, rng_key):
        self.layer = nnx.Linear(in_features, out_features, rngs=nnx.Rngs(rng_key))

    def __call__(self, x):
        return self.layer(x)


class Normalised(Flax):
    def __init__(self, in_features, out_features, rng_key):
        super().__init__(in_features, out_features, rng_key)
        self.norm = nnx.BatchNorm(in_features, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(self.norm(x))


class Equinox(equinox.Module):
    layer: equinox.nn.Linear

    def __init__(self, in_features, out_features, rng_key):
        self.layer = equinox.nn.Linear(in_features, out_features, key=rng_key)

    def __call__(self, x):
        return jax.vmap(self.layer)(x)


@pytest.mark.parametrize(
    "name",
    [
        "deterministic_start",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("autoregression_1", "two_coupled_sites", "matrix", "positive", "padded")
        ),
    ],
)
def test_programs(name):
    """Log densities are finite, and the distributions can be read as Gaussians, those that `quantiles` tells."""
    program = BY_NAME[name]
    guide, params = initialised(program.model, *program.args, network=Flax)
    pvmc = PVMC(program.model, guide, num_particles=4)
    arguments = Arguments(program.args)
    structure = read_structure(program.model, arguments, {})
    _, proposal = read_proposal(structure, guide, arguments, params)
    posterior = pvmc.posterior(random.key(0), params, *program.args)
    assert np.isfinite(posterior.log_normalizer).all()
    found = guide.quantiles(params, [0.2, 0.5, 0.8], *program.args)
    for site, latent in structure.step.items():
        assert found[site].shape == (3, program.length, *latent.shape)
        assert (found[site][0] < found[site][1]).all()
        assert (found[site][1] < found[site][2]).all()
    if name == "matrix":
        assert_allclose(proposal.steps.mean.ravel(), found["x"][1].ravel(), rtol=1e-5)
    draws = guide.sample_posterior(random.key(1), params, *program.args, sample_shape=(300, 2))
    for site in structure.sites:
        share = np.mean(draws[site] < found[site][0])
        assert abs(share - 0.2) < 4 * (0.2 * 0.8 / draws[site].size) ** 0.5 + 1e-3


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(Flax, marks=pytest.mark.slow),
        pytest.param(Equinox(2, 2, random.key(0)), marks=pytest.mark.slow),
        pytest.param(Recurrent(3), marks=pytest.mark.slow),
    ],
)
def test_networks_of_flax_and_equinox_learn(network):
    y = jnp.asarray(simulate(0, 6, 3))
    guide, pvmc, params = trained(model, y, network=network, steps=5)
    start = pvmc.get_params(pvmc.init(random.key(0), y))
    arrays = [name for name in params if name.startswith("auto_network.")]
    assert len(arrays) >= 2
    assert all(np.abs(params[name] - start[name]).max() > 0 for name in arrays if "output" in name or "layer" in name)
    assert guide.median(params, jnp.asarray(simulate(1, 9, 2)))["x"].shape == (9, 2)


@pytest.mark.parametrize(
    "network", [Convolutions(), pytest.param(Convolutions((4, 4), 4), marks=pytest.mark.slow), Recurrent(5)]
)
def test_networks_take_any_length(network):
    built = network(3, 2, random.key(0))
    for length in (1, 2, 40):
        assert built(jnp.ones((length, 3))).shape == (length, 2)


def test_convolutions_read_what_they_say():
    built = Convolutions(channels=(4, 4), width=5)(1, 1, random.key(1))
    built.output.kernel = nnx.Param(jnp.ones((4, 1)))
    for layer in built.hidden:
        layer.bias = nnx.Param(jnp.full(4, 10.0))  # so that no rectifier is shut
    read = jax.jacobian(built)(random.normal(random.key(0), (41, 1)))[20, 0, :, 0]
    assert_array_equal(np.flatnonzero(read), np.arange(16, 25))


@pytest.mark.slow
def test_stock_svi_takes_the_guide():
    y = jnp.asarray(simulate(0, 10, 3))
    for loss in (Trace_ELBO(), ImportanceSmoothedELBO(num_particles=4)):
        guide = AutoAmortisedNormal(model, SMALL)
        svi = SVI(model, guide, optax.adam(1e-2), loss)
        result = svi.run(random.key(0), 20, y, progress_bar=False)
        params = result.params | result.state.mutable_state
        assert np.isfinite(result.losses).all()
        assert guide.median(params, y)["x"].shape == y.shape
        with pytest.raises(ValueError, match=r"the units .*'auto_features'.*mutable_state"):
            guide.median(result.params, y)


@pytest.mark.slow
def test_global_sites_have_a_guide_of_their_own():
    def program(y):
        slope = numpyro.sample("slope", dist.Normal(0.5, 0.5))

        def step(x_prev, y_t):
            x = numpyro.sample("x", dist.Normal(slope * x_prev, 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, None

        scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)

    y = jnp.asarray(simulate(0, 8, 1)[:, 0])
    with pytest.raises(ValueError, match=r"has others: .*slope.*AutoGuideList"):
        trained(program, y)
    guide = AutoGuideList(program)
    guide.append(AutoAmortisedNormal(handlers.block(handlers.seed(program, 0), hide=["slope"]), SMALL))
    guide.append(AutoNormal(handlers.block(handlers.seed(program, 0), expose=["slope"]), prefix="globals"))
    pvmc = PVMC(program, guide, num_particles=4)
    result = pvmc.run(random.key(0), 20, y, progress_bar=False)
    assert pvmc.posterior(random.key(1), result.params, y).mean()["x"].shape == (8,)
    draws = guide.sample_posterior(random.key(1), result.params, y, sample_shape=(5,))
    assert draws["slope"].shape == (5,)
    assert draws["x"].shape == (5, 8)


@pytest.mark.slow
def test_features_of_the_users_own():
    y = jnp.asarray(simulate(0, 6, 3))
    for rows in (lambda y: jnp.stack([y, y**2], -1), lambda y: jnp.ones((7, 3, 2))):
        _, params = initialised(model, y, features=rows)
        assert params["auto_features"].shape == (2, 2)
    with pytest.raises(ValueError, match=r"shape \(6, 3\), but the chain needs \(6, 3, 'E'\)"):
        initialised(model, y, features=lambda y: y)


def test_errors_name_the_cause():
    y = jnp.asarray(simulate(0, 6, 3))
    with pytest.raises(ValueError, match=r"returned an array of shape \(7, 3\) .* needs \(7, 2\): a location and a log scale"):
        initialised(model, y, network=Flax(2, 3, random.key(0)))
    with pytest.raises(ValueError, match=r"cannot read the features .* shape \(7, 2\)"):
        initialised(model, y, network=Flax(5, 2, random.key(0)))
    with pytest.raises(ValueError, match="`LayerNorm`"):
        initialised(model, y, network=Normalised)
    with pytest.raises(TypeError, match="but made a function"):
        initialised(model, y, network=lambda *_: lambda x: x)
    with pytest.raises(TypeError, match="but got a int"):
        AutoAmortisedNormal(model, 3)
    guide, params = initialised(model, y)
    for ask in (guide.median, lambda params: guide.sample_posterior(random.key(0), params)):
        with pytest.raises(ValueError, match="reads the data: pass the arguments"):
            ask(params)
    with pytest.raises(ValueError, match="observes nothing"):
        initialised(lambda: scan(lambda x, _: (numpyro.sample("x", dist.Normal(x, 1.0)), None), 0.0, None, length=3))
