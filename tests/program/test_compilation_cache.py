"""What one process has compiled another one takes over."""

import os
import subprocess
import sys

PROGRAM = """
import sys
import jax
import numpyro_pvmc
from jax import monitoring

found = []
monitoring.register_event_listener(lambda name, **kwargs: found.append(name.rsplit("/", 1)[-1]))
path = numpyro_pvmc.enable_compilation_cache(*sys.argv[1:])
jax.block_until_ready(jax.jit(lambda x: x * 2 + 1)(1.0))
print(path, found.count("cache_hits"), found.count("cache_misses"))
"""


def run(*args, **environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, args)], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    path, hits, misses = done.stdout.split()
    return path, int(hits), int(misses)


def test_the_second_process_compiles_nothing(tmp_path):
    directory = tmp_path / "new" / "one"
    path, hits, misses = run(directory)
    assert path == str(directory)
    assert hits == 0
    assert misses > 0
    assert run(directory) == (path, misses, 0)


def test_the_directory_is_one_of_the_user(tmp_path):
    path, _, _ = run(XDG_CACHE_HOME=str(tmp_path))
    assert path == str(tmp_path / "numpyro_pvmc")
    assert any((tmp_path / "numpyro_pvmc").iterdir())
