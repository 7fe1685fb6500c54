"""What values a site of a random program may take, and which distributions over them it may have.

A domain says how its values become `width` real *features* and back, so that any site can read any other; a distribution takes
means of shape (*batch, width) and a positive scale of shape (*batch), or that broadcasts with it.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import expit, logit
from numpyro.distributions import transforms


class Domain(NamedTuple):
    distributions: Mapping[str, Callable]
    feature: Callable = lambda x: x[..., None]
    value: Callable = lambda f: f[..., 0]
    width: int = 1
    event_dim: int = 0
    states: int | None = None  # a number of states that can be summed
    has_gradient: bool = True


def scalar(distribution):
    return lambda m, s: distribution(*jnp.broadcast_arrays(m[..., 0], s))


def vector(distribution):
    return lambda m, s: distribution(m, jnp.broadcast_to(jnp.asarray(s)[..., None], m.shape))


def transformed(distribution, *steps):
    return lambda m, s: dist.TransformedDistribution(distribution(m, s), list(steps))


LOW, HIGH = -2.0, 2.5
MIX = np.array([[1.0, 0.0], [0.6, 0.8]])
normal, normals = scalar(dist.Normal), vector(lambda m, s: dist.Normal(m, s).to_event(1))
exponential, onto_unit = transforms.ExpTransform(), transforms.SigmoidTransform()


def bounds(m):
    """NumPyro's scan stacks the numbers of a distribution over time, and does not align those of its support, or of a
    transform, with a plate: they need its shape."""
    return jnp.full(m.shape[:-1], LOW), jnp.full(m.shape[:-1], HIGH)


def truncated(m, s):
    low, high = bounds(m)
    return dist.TruncatedNormal(m[..., 0], s, low=low, high=high)


def squashed(m, s):
    low, high = bounds(m)
    return dist.TransformedDistribution(normal(m, s), [onto_unit, transforms.AffineTransform(low, high - low)])


def covariance(m, s):
    scale_tril = s[..., None, None] * jnp.asarray(MIX)
    return dist.MultivariateNormal(m, scale_tril @ jnp.swapaxes(scale_tril, -1, -2))


def matrix_normal(m, s):
    m, s = m.reshape(*m.shape[:-1], 2, 2), jnp.asarray(s)[..., None, None]
    return dist.Normal(m, jnp.broadcast_to(s, m.shape)).to_event(2)


def from_interval(x):
    return logit((x - LOW) / (HIGH - LOW))


DOMAINS = {
    "real": Domain(
        {
            "Normal": normal,
            "StudentT": scalar(lambda m, s: dist.StudentT(5.0, m, s)),
            "Laplace": scalar(dist.Laplace),
            "Logistic": scalar(dist.Logistic),
            "Gumbel": scalar(dist.Gumbel),
            "affine Normal": scalar(
                lambda m, s: dist.TransformedDistribution(
                    dist.Normal(jnp.zeros_like(m), jnp.ones_like(m)), transforms.AffineTransform(m, s)
                )
            ),
            "mixture": scalar(
                lambda m, s: dist.MixtureSameFamily(
                    dist.Categorical(jnp.broadcast_to(jnp.array([0.3, 0.7]), (*m.shape, 2))),
                    dist.Normal(m[..., None] + jnp.array([-0.5, 0.5]), s[..., None]),
                )
            ),
        }
    ),
    "interval": Domain(
        {
            "TruncatedNormal": truncated,
            "squashed Normal": squashed,
            "Uniform": lambda m, s: dist.Uniform(*bounds(m)),
        },
        feature=lambda x: from_interval(x)[..., None],
        value=lambda f: LOW + (HIGH - LOW) * expit(f[..., 0]),
    ),
    "positive": Domain(
        {
            "LogNormal": scalar(dist.LogNormal),
            "Gamma": scalar(lambda m, s: dist.Gamma(2.0 + s, jnp.exp(-m))),
            "Weibull": scalar(lambda m, s: dist.Weibull(jnp.exp(m), 1.5 + s)),
            "HalfNormal": scalar(lambda m, s: dist.HalfNormal(jnp.exp(m))),
            "exp Normal": transformed(normal, exponential),
        },
        feature=lambda x: jnp.log(x)[..., None],
        value=lambda f: jnp.exp(f[..., 0]),
    ),
    "unit": Domain(
        {
            "Beta": scalar(lambda m, s: dist.Beta(1.5 + jnp.exp(m), 1.5 + s)),
            "Kumaraswamy": scalar(lambda m, s: dist.Kumaraswamy(1.0 + jnp.exp(m), 1.5 + s)),
            "sigmoid Normal": transformed(normal, onto_unit),
        },
        feature=lambda x: logit(x)[..., None],
        value=lambda f: expit(f[..., 0]),
    ),
    "vector": Domain(
        {
            "Normal to_event": normals,
            "Laplace to_event": vector(lambda m, s: dist.Laplace(m, s).to_event(1)),
            "covariance": vector(lambda m, s: covariance(m, s[..., 0])),
            "scale_tril": vector(lambda m, s: dist.MultivariateNormal(m, scale_tril=s[..., None] * jnp.asarray(MIX))),
            "low rank": vector(lambda m, s: dist.LowRankMultivariateNormal(m, s[..., None] * jnp.array([[0.5], [0.2]]), s)),
            "StudentT": vector(lambda m, s: dist.MultivariateStudentT(6.0, m, s[..., None] * jnp.asarray(MIX))),
        },
        feature=lambda x: x,
        value=lambda f: f,
        width=2,
        event_dim=1,
    ),
    "simplex": Domain(
        {
            "Dirichlet": vector(lambda m, s: dist.Dirichlet(1.5 + jnp.exp(jnp.concatenate([m, s[..., :1]], -1)))),
            "broken stick": transformed(normals, transforms.StickBreakingTransform()),
        },
        feature=lambda x: jnp.log(x[..., :2] / x[..., 2:]),
        value=lambda f: jax.nn.softmax(jnp.concatenate([f, jnp.zeros_like(f[..., :1])], -1)),
        width=2,
        event_dim=1,
    ),
    "ordered": Domain(
        {"ordered Normal": transformed(normals, transforms.OrderedTransform())},
        feature=lambda x: jnp.stack([x[..., 0], jnp.log(x[..., 1] - x[..., 0])], -1),
        value=lambda f: jnp.stack([f[..., 0], f[..., 0] + jnp.exp(f[..., 1])], -1),
        width=2,
        event_dim=1,
    ),
    "matrix": Domain(
        {"Normal to_event(2)": matrix_normal},
        feature=lambda x: x.reshape(*x.shape[:-2], 4),
        value=lambda f: f.reshape(*f.shape[:-1], 2, 2),
        width=4,
        event_dim=2,
    ),
    "circle": Domain(
        {"VonMises": scalar(lambda m, s: dist.VonMises(jnp.tanh(m), 1.0 + s))},
        feature=lambda x: jnp.sin(x)[..., None],
        value=lambda f: jnp.tanh(f[..., 0]),
        has_gradient=False,
    ),
    "states": Domain(
        {"Categorical": lambda m, s: dist.Categorical(logits=jnp.concatenate([m, jnp.zeros_like(m[..., :1])], -1))},
        feature=lambda x: jnp.stack([1.0 * (x == 0), 1.0 * (x == 1)], -1),
        value=lambda f: jnp.zeros(f.shape[:-1], int),
        width=2,
        states=3,
        has_gradient=False,
    ),
    "switch": Domain(
        {
            "Bernoulli": scalar(lambda m, s: dist.Bernoulli(logits=m)),
            "Categorical of two": scalar(lambda m, s: dist.Categorical(jnp.stack([expit(m), expit(-m)], -1))),
        },
        feature=lambda x: 1.0 * x[..., None],
        value=lambda f: jnp.zeros(f.shape[:-1], int),
        states=2,
        has_gradient=False,
    ),
    "count": Domain(
        {"Poisson": scalar(lambda m, s: dist.Poisson(jnp.exp(jnp.clip(m, -2, 2))))},
        feature=lambda x: jnp.log1p(1.0 * x)[..., None],
        value=lambda f: jnp.zeros(f.shape[:-1], int),
        has_gradient=False,
    ),
}


class Emission(NamedTuple):
    """`distribution` takes means (*batch, width); `data` takes a generator and the batch shape."""

    distribution: Callable
    data: Callable
    width: int = 1
    event: tuple[int, ...] = ()


def reals(rng, shape):
    return rng.normal(size=shape)


def up_to(largest):
    return lambda rng, shape: rng.integers(0, largest + 1, shape)


EMISSIONS = {
    "Normal": Emission(lambda m: dist.Normal(m[..., 0], 0.7), reals),
    "StudentT": Emission(lambda m: dist.StudentT(4.0, m[..., 0], 0.6), reals),
    "Normal of unknown scale": Emission(lambda m: dist.Normal(0.0, jnp.exp(m[..., 0] / 2)), reals),
    "Gamma": Emission(lambda m: dist.Gamma(2.0, jnp.exp(-m[..., 0])), lambda rng, shape: rng.gamma(2.0, size=shape)),
    "Poisson": Emission(lambda m: dist.Poisson(jnp.exp(m[..., 0])), up_to(4)),
    "NegativeBinomial": Emission(lambda m: dist.NegativeBinomial2(jnp.exp(m[..., 0]), 3.0), up_to(4)),
    "Bernoulli": Emission(lambda m: dist.Bernoulli(logits=m[..., 0]), up_to(1)),
    "Binomial": Emission(lambda m: dist.Binomial(5, logits=m[..., 0]), up_to(5)),
    "Categorical": Emission(lambda m: dist.Categorical(logits=m), up_to(2), width=3),
    "Normal to_event": Emission(lambda m: dist.Normal(m, 0.7).to_event(1), reals, width=3, event=(3,)),
    "MultivariateNormal": Emission(lambda m: dist.MultivariateNormal(m, scale_tril=jnp.asarray(MIX)), reals, 2, (2,)),
}
