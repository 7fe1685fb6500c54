"""What an import costs, and says where something is missing."""

import subprocess
import sys

import pytest
from scipy.stats import qmc

from numpyro_pvmc.guides.quasirandom import has_points


def python(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize(("module", "package"), [("networks", "flax")])
def test_a_missing_extra_is_named(module, package):
    done = python(f"import sys\nsys.modules[{package!r}] = None\nimport numpyro_pvmc.{module}")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert f'pip install "numpyro_pvmc[{module}]"' in last


def test_the_import_leaves_out_what_takes_longer_than_the_rest():
    done = python(
        "import sys, numpyro_pvmc\nprint([name for name in ('scipy.stats', 'arviz', 'matplotlib') if name in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_there_are_as_many_coordinates_as_scipy_has():
    assert has_points(qmc.Sobol.MAXDIM)
    assert not has_points(qmc.Sobol.MAXDIM + 1)
