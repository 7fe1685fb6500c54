"""Put draws, data and summaries of a posterior into ArviZ's groups."""

from typing import Any

import jax
import numpy as np

from numpyro_pvmc.program.structure import Structure


def to_arviz(
    structure: Structure,
    time: np.ndarray,
    samples: dict[str, jax.Array],
    observed: dict[str, jax.Array],
    summary: dict[str, jax.Array],
) -> Any:
    """Make ArviZ data, with coordinates for time and plates.

    :param time: coordinate of its steps.
    :param samples: draws, ``{site: (number, ...)}``, for the group ``posterior``.
    :param observed: the data, by site.
    :param summary: what belongs to no draw, for the group ``smoothing``.
    :return: an `arviz.InferenceData`, or from ArviZ 1 an `xarray.DataTree`.
    """
    import arviz

    plates = [plate.name for plate in structure.plates]
    sizes = tuple(plate.size for plate in structure.plates)
    coords = {"time": time} | {plate.name: np.arange(plate.size) for plate in structure.plates}

    def named(arrays, without_time):
        dims = {}
        for name, x in arrays.items():
            along = ["time"] if x.shape[:1] == (structure.length,) and name not in without_time else []
            along += plates if plates and x.shape[len(along) : len(along) + len(plates)] == sizes else []
            dims[name] = along + [f"{name}_dim_{i}" for i in range(x.ndim - len(along))]
        return dims

    samples, observed, summary = ({n: np.asarray(x) for n, x in part.items()} for part in (samples, observed, summary))
    draws = {name: x[None] for name, x in samples.items()}
    initial = tuple(site.name for site in structure.initial_latents)
    outside = (*initial, *structure.global_sites, *structure.initial_factors, *structure.global_factors)
    dims = named({name: x[0] for name, x in samples.items()}, outside) | named(observed, outside)
    kinds = ("mean", "sd", "effective_sample_size", "probability")
    summaries = ("log_normalizer", *(f"{site.name}_{of}" for site in structure.initial_latents for of in kinds))
    dataset = _dataset(summary, named(summary, summaries), coords)
    if int(arviz.__version__.split(".")[0]) >= 1:
        data = arviz.from_dict({"posterior": draws, "observed_data": observed}, dims=dims, coords=coords)
        data["smoothing"] = dataset
        return data
    data = arviz.from_dict(posterior=draws, observed_data=observed, dims=dims, coords=coords)
    data.add_groups({"smoothing": dataset}, warn_on_custom_groups=False)
    return data


def _dataset(arrays, dims, coords):
    import xarray

    used = {dim for names in dims.values() for dim in names}
    variables = {name: (dims[name], x) for name, x in arrays.items()}
    return xarray.Dataset(variables, {name: x for name, x in coords.items() if name in used})
