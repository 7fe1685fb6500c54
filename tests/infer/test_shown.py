"""What is shown of an inference, its guide and its result is a few lines, without arrays."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer.autoguide import AutoNormal

from conftest import few_particles
from numpyro_pvmc import PVMC, AutoSmoothedNormal, AutoStateSpace
from numpyro_pvmc.infer.result import RunResult

Y = jnp.zeros((6, 3))


def panel(y):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    series = numpyro.plate("series", 3)

    def step(x_prev, y_t):
        with series:
            x = numpyro.sample("x", dist.Normal(0.9 * x_prev, scale))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    with series:
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
    scan(step, x_0, y)


@few_particles
def test_an_inference_before_and_after_it_met_data():
    pvmc = PVMC(panel, num_particles=4)
    assert repr(pvmc) == (
        "PVMC for panel\n"
        "  no data met yet\n"
        "  objective: ImportanceSmoothedELBO(num_particles=4, gradient='doubly_reparam', method='auto', particles='rqmc')\n"
        "  guide: AutoStateSpace\n"
        "    parameters: chosen when it meets data\n"
        "    states: AutoSmoothedNormal (covariance='full', init='prior', rate=0.5)"
    )
    result = pvmc.run(jax.random.key(0), 20, Y, progress_bar=False)
    assert "\n  chain of 'x_0', 'x': T = 6 steps, 3 series of plate 'series'\n" in repr(pvmc)
    assert "\n    parameters: AutoMultivariateNormal of 'scale'\n" in repr(pvmc)
    assert "\n    states: AutoSmoothedNormal of 'x', 'x_0' (" in repr(pvmc)
    first, second = repr(result).split("\n")
    assert first.startswith("RunResult of 20 updates: mean loss ")
    assert f"mean loss {result.losses[-2:].mean():.6g} over the last 2, {result.losses[:2].mean():.6g} over the first" in first
    assert "'auto_scale_tril' (1, 1)" in second
    jax.eval_shape(lambda result: repr(result) and result, result)


@pytest.mark.parametrize(
    ("guide", "shown"),
    [
        (AutoNormal(panel), "AutoNormal"),
        (AutoStateSpace(panel, AutoNormal, AutoNormal), "parameters: AutoNormal\n    states: AutoNormal"),
        (AutoSmoothedNormal(panel, covariance="full"), "AutoSmoothedNormal (covariance='full', init='prior', rate=0.5)"),
    ],
)
def test_guides(guide, shown):
    assert repr(PVMC(panel, guide)).endswith(shown)


def test_many_parameters():
    many = RunResult({f"p{i}": jnp.zeros(2) for i in range(12)} | {"net": {"w": jnp.zeros(3), "b": 0.0}}, None, jnp.zeros(0))
    assert repr(many).endswith("'p9' (2,), 3 more")
    assert "'net' 4 numbers in 2 arrays" in repr(many._replace(params={"net": many.params["net"]}))
