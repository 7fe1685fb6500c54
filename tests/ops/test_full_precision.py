"""What the library itself multiplies is multiplied in full precision, where a GPU would round float32 to eleven bits."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr
from numpyro import plate
from numpyro.contrib.control_flow import scan
from numpyro.distributions.util import lazy_property

from conftest import few_particles
from numpyro_pvmc import PVMC, AutoSmoothedNormal, ImportanceSmoothedELBO, SupervisedELBO
from numpyro_pvmc.chain.pairwise import pair_form
from numpyro_pvmc.exact import exact_posterior
from numpyro_pvmc.ops.full_precision import full_precision

pytestmark = few_particles

Y = jnp.linspace(-1.0, 1.0, 12).reshape(6, 2)


@pytest.fixture(autouse=True)
def precise_draws_of_numpyro(monkeypatch):
    """What NumPyro multiplies, draws and what it keeps beside them, is not ours."""
    distribution = dist.MultivariateNormal
    monkeypatch.setattr(distribution, "sample", full_precision(distribution.sample))
    monkeypatch.setattr(
        distribution, "covariance_matrix", lazy_property(full_precision(distribution.covariance_matrix.wrapped))
    )


def model(y, states=None):
    """Without a product of matrices of its own."""

    def step(x_prev, y_t):
        z = numpyro.sample("z", dist.Normal(0.9 * x_prev[1], 0.5).expand([2]).to_event(1))
        x = numpyro.sample("x", dist.MultivariateNormal(0.9 * x_prev[0], jnp.eye(2)))
        numpyro.sample("y", dist.Normal(x + z, 1.0).to_event(1), obs=y_t)
        return (x, z), None

    scan(step, (jnp.zeros(2), jnp.zeros(2)), y)


def hidden_markov_model(y, product=jnp.matmul):
    def step(z_prev, y_t):
        probs = product(jax.nn.one_hot(z_prev, 2), jnp.array([[0.9, 0.1], [0.2, 0.8]]))
        z = numpyro.sample("z", dist.Categorical(probs=probs))
        numpyro.sample("y", dist.Normal(jnp.array([-1.0, 1.0])[z], 1.0), obs=y_t)
        return z, None

    scan(step, 0, y)


def precisions(program):
    """Of the products of matrices in a program."""
    found = []
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation.params["precision"])
        for value in equation.params.values():
            inner = value if isinstance(value, tuple) else (value,)
            for one in inner:
                if isinstance(one, Jaxpr | ClosedJaxpr):
                    found += precisions(getattr(one, "jaxpr", one))
    return found


def own_guide(y):
    """With a distribution that multiplies a matrix, to draw from and to refit."""
    with plate("steps", len(y)):
        numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("x", dist.MultivariateNormal(jnp.zeros(2), scale_tril=jnp.eye(2)))


def learning(loss, **choices):
    guide = AutoSmoothedNormal(model, **choices)
    pvmc = PVMC(model, guide, loss=loss)
    state = pvmc.init(jax.random.key(0), Y, Y)
    return lambda y: pvmc.update(state, y, y)


def refined(y):
    return PVMC(model, num_particles=16).posterior(jax.random.key(0), {}, y, refine=2).log_normalizer


def from_mode(y):
    return PVMC(model, AutoSmoothedNormal(model, init="laplace")).init(jax.random.key(0), y)


def by_own_guide(refine):
    pvmc = PVMC(model, own_guide, num_particles=16)
    return lambda y: pvmc.posterior(jax.random.key(0), {}, y, refine=refine).log_normalizer


def states_of_particles(y):
    return (
        PVMC(hidden_markov_model)
        .posterior(jax.random.key(0), {}, y[:, 0], product=full_precision(jnp.matmul))
        .state_probabilities
    )


def drawn_exactly(y):
    return exact_posterior(model, {}, y).sample(jax.random.key(0), (3,))


def low_rank(y):
    return pair_form(full_precision(dist.LowRankMultivariateNormal)(y, jnp.ones((6, 2, 1)), jnp.ones((6, 2)))).parameters


def drawn(y):
    """By the guide alone, without the weights."""
    guide = AutoSmoothedNormal(model, covariance="full")
    pvmc = PVMC(model, guide)
    return guide.sample_posterior(jax.random.key(0), pvmc.get_params(pvmc.init(jax.random.key(0), y)), sample_shape=(3,))


PROGRAMS = {
    "update": lambda: learning(ImportanceSmoothedELBO(16), covariance="full"),
    "associative": lambda: learning(ImportanceSmoothedELBO(16, method="associative"), covariance="diagonal"),
    "blocked": lambda: learning(ImportanceSmoothedELBO(16, method="blocked")),
    "mode": lambda: from_mode,
    "supervised": lambda: learning(SupervisedELBO(lambda y, states: {"x": states}, 16)),
    "refined": lambda: refined,
    "drawn": lambda: drawn,
    "own guide": lambda: by_own_guide(0),
    "own guide refitted": lambda: by_own_guide(1),
    "states of particles": lambda: states_of_particles,
    "drawn exactly": lambda: drawn_exactly,
    "low rank": lambda: low_rank,
    "linear-Gaussian": lambda: lambda y: exact_posterior(model, {}, y).log_normalizer,
    "finite": lambda: lambda y: exact_posterior(hidden_markov_model, {}, y[:, 0]).state_probabilities,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_is_multiplied_by_its_first_bits(name):
    found = precisions(jax.make_jaxpr(PROGRAMS[name]())(Y).jaxpr)
    assert found
    assert set(found) == {(lax.Precision.HIGHEST, lax.Precision.HIGHEST)}


def test_derivatives_are_as_precise():
    product = full_precision(lambda x: (x @ x).sum())
    assert set(precisions(jax.make_jaxpr(jax.grad(jax.grad(lambda x: product(x * jnp.ones((2, 2))))))(1.0).jaxpr)) == {
        (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
    }
