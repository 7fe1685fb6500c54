"""Memory grows with T K, not with T K^2."""

import sys

import pytest

from peak_memory import peak_memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize(
    "loss", ["ImportanceSmoothedELBO(K)", pytest.param('SupervisedELBO(lambda y: {"x": y}, K)', marks=pytest.mark.slow)]
)
def test_value_and_gradient_of_a_long_series(loss):
    """The pairs alone, 10,000 x 4 x 64 x 64 in float32, would take 0.66 GB, and autodiff keeps several copies."""
    assert peak_memory(10_000, 64, 4, loss) < 1.5e9
