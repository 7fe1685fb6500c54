"""An engine beside the others: what the frame asks of it, and what it gets."""

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer import Trace_ELBO

from numpyro_pvmc.chain.chain import presence, read_chain
from numpyro_pvmc.chain.densities import particles_of
from numpyro_pvmc.chain.potentials import chain_potentials
from numpyro_pvmc.chain.reading import read_structure
from numpyro_pvmc.guides.checks import GuideKind
from numpyro_pvmc.infer.objective import ChainELBO
from numpyro_pvmc.infer.svi import ChainSVI
from numpyro_pvmc.ops.smoothing import log_normalizer, marginals
from numpyro_pvmc.posterior.particles import smoothed_posterior
from numpyro_pvmc.program.arguments import Arguments

Y = jnp.asarray(np.random.default_rng(0).normal(size=6), jnp.float32)


class GridELBO(ChainELBO):
    """The evidence by numerical integration: every real state stands on one grid (Kitagawa, JASA 1987)."""

    width = 12.0

    def check(self, structure, guide, arguments, params):
        return GuideKind()  # there is nothing to draw

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs):
        potentials = self._potentials(param_map, model, Arguments(args, kwargs))
        log_z = log_normalizer(potentials.node, potentials.edges, potentials.mask)
        return {"loss": -log_z.sum() - potentials.log_weight_globals, "mutable_state": None}

    def posterior(self, rng_key, model, guide, arguments, params):
        potentials = self._potentials(params, model, arguments)
        return smoothed_posterior(potentials, marginals(potentials.node, potentials.edges, potentials.mask))

    def _potentials(self, params, model, arguments):
        structure = read_structure(model, arguments, params)
        grid, values = self.width * (jnp.arange(self.num_particles) + 0.5) / self.num_particles - self.width / 2, {}
        for name, site in structure.sites.items():
            shape = (structure.length, *site.shape) if name in structure.step else site.shape
            values[name] = jnp.broadcast_to(grid.reshape(-1, *(1,) * len(shape)), (self.num_particles, *shape))
        chain = read_chain(structure, model, arguments, params)
        plates = [plate.size for plate in structure.plates]
        log_q = jnp.full((structure.length + 1, *plates, self.num_particles), -jnp.log(self.width))
        return chain_potentials(chain, particles_of(structure, values), log_q, presence(chain))


def model(y):
    decay = numpyro.param("decay", 0.2)

    def step(x_prev, y_t):
        x = numpyro.sample("x", dist.Normal(decay * x_prev, 0.7))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, numpyro.sample("x_0", dist.Normal(0.0, 1.0)), y)


def no_guide(y):
    pass


def by_hand(decay):
    """Log evidence, means and variances by a Kalman filter and smoother."""
    mean, variance, log_z, filtered = 0.0, 1.0, 0.0, [(0.0, 1.0)]
    for y in np.asarray(Y, float):
        mean, variance = decay * mean, decay**2 * variance + 0.49
        total = variance + 0.25
        log_z -= 0.5 * (np.log(2 * np.pi * total) + (y - mean) ** 2 / total)
        mean, variance = mean + variance / total * (y - mean), variance * 0.25 / total
        filtered.append((mean, variance))
    smoothed = [filtered[-1]]
    for mean, variance in filtered[-2::-1]:
        ahead, gain = decay**2 * variance + 0.49, decay * variance / (decay**2 * variance + 0.49)
        smoothed.insert(0, (mean + gain * (smoothed[0][0] - decay * mean), variance + gain**2 * (smoothed[0][1] - ahead)))
    return log_z, *np.array(smoothed[1:]).T


@pytest.fixture(scope="module")
def svi():
    return ChainSVI(model, no_guide, optax.adam(0.05), GridELBO(120))


def test_it_is_trained(svi, capsys):
    result = svi.run(jax.random.key(0), 150, Y)
    assert "bound: " in capsys.readouterr().err
    grid = np.linspace(-2, 2, 801)
    best = grid[np.argmax([by_hand(decay)[0] for decay in grid])]
    assert abs(result.params["decay"] - best) < 0.01
    np.testing.assert_allclose(result.losses[-1], -by_hand(best)[0], atol=1e-3)


def test_it_has_posteriors(svi):
    posterior = svi.posterior(jax.random.key(0), {"decay": 0.6}, Y)
    log_z, means, variances = by_hand(0.6)
    np.testing.assert_allclose(posterior.log_normalizer, log_z, atol=1e-4)
    np.testing.assert_allclose(posterior.mean()["x"], means, atol=1e-4)
    np.testing.assert_allclose(posterior.variance()["x"], variances, atol=1e-4)
    assert "T = 6 steps, K = 120 particles" in repr(posterior)


def test_it_has_draws_and_arviz(svi):
    samples = svi.sample_posterior(jax.random.key(0), {"decay": 0.6}, Y, sample_shape=(4000,))
    _, means, variances = by_hand(0.6)
    assert np.abs(samples["x"].mean(0) - means).max() < 5 * np.sqrt(variances.max() / 4000)
    data = svi.posterior(jax.random.key(0), {"decay": 0.6}, Y).to_arviz(num_samples=50)
    assert data["posterior"]["x"].dims == ("chain", "draw", "time")
    assert float(arviz.summary(data, var_names=["x_0"])["sd"].iloc[0]) > 0


def test_what_it_says_where_few_points_count(svi):
    with pytest.warns(UserWarning, match=r"Train the guide for longer, or take more particles\.$"):
        svi.posterior(jax.random.key(0), {"decay": 0.6}, Y.at[2].set(30.0))


def test_an_objective_of_numpyro_has_no_posterior():
    def guide(y):
        numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(y, 1.0))

    svi = ChainSVI(model, guide, optax.adam(0.05), Trace_ELBO())
    result = svi.run(jax.random.key(0), 5, Y, progress_bar=False)
    assert np.isfinite(result.losses).all()
    with pytest.raises(TypeError, match="needs the loss `ImportanceSmoothedELBO`, but here it is Trace_ELBO"):
        svi.posterior(jax.random.key(0), result.params, Y)


def test_an_objective_without_a_posterior_says_so():
    class Untold(GridELBO):
        posterior = ChainELBO.posterior

    with pytest.raises(TypeError, match="The objective `Untold` has no posterior"):
        ChainSVI(model, no_guide, optax.adam(0.05), Untold(120)).posterior(jax.random.key(0), {"decay": 0.6}, Y)
