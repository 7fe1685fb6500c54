"""A seed in, a state-space program out: a NumPyro model, a guide that fits it, data.

What is chosen is whatever a program may choose by the library's contract, and what is refused is not generated: distributions,
what reads what, the form of the carry, how the chain starts, inputs, emissions in the body and after it, plates, absent steps,
parameters, global sites, and how the guide is written.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer.autoguide import AutoNormal

from numpyro_pvmc import markov
from random_distributions import DOMAINS, EMISSIONS

POSITIVE = dist.constraints.positive
NONLINEAR = {"linear": lambda x: x, "tanh": jnp.tanh, "sin": jnp.sin, "square": lambda x: jnp.clip(0.3 * x**2, -2, 2)}
DISCRETE = ("states", "switch", "count")


class RandomProgram(NamedTuple):
    """`scored` is the model for NumPyro to score: `model` itself, but for the scale of a subsampled plate."""

    seed: int
    choices: tuple[str, ...]
    model: Callable
    guide: Callable
    args: tuple
    kwargs: dict[str, Any]
    params: dict[str, Any]
    num_particles: int
    length: int
    sites: tuple[str, ...]
    initial_sites: tuple[str, ...]
    present: np.ndarray | None
    states: dict[str, np.ndarray]
    ignore: tuple[str, ...]
    scored: Callable
    validated: bool

    @property
    def is_masked(self):
        return any("is masked: NaN" in choice for choice in self.choices) or self.present is not None

    def __str__(self):
        return f"random_program({self.seed}): " + "; ".join(self.choices)


class Chooser:
    """A generator of random numbers that writes down what it chose."""

    def __init__(self, seed):
        self.rng, self.made = np.random.default_rng([2024, seed]), []

    def pick(self, what, options, weights=None):
        weights = None if weights is None else np.array(weights) / np.sum(weights)
        option = list(options)[self.rng.choice(len(options), p=weights)]
        self.made.append(f"{what}: {option}")
        return option

    def chance(self, what, probability):
        happens = bool(self.rng.random() < probability)
        if happens:
            self.made.append(what)
        return happens

    def some(self, options, at_least=0):
        """A random subset, in order."""
        options = list(options)
        size = int(self.rng.integers(at_least, len(options) + 1))
        return [options[i] for i in sorted(self.rng.permutation(len(options))[:size])]

    def numbers(self, *shape, scale=0.5):
        return self.rng.normal(size=shape) * scale


class Map(NamedTuple):
    """What is read, and the means (*batch, width) it is turned into."""

    reads: tuple[str, ...]
    weights: np.ndarray
    bias: np.ndarray
    form: str

    def __call__(self, features, batch, slope=1.0):
        bias = jnp.broadcast_to(jnp.asarray(self.bias), (*batch, self.bias.shape[-1]))
        if not self.reads:
            return bias
        parts = [jnp.asarray(features[name]) for name in self.reads]
        leading = np.broadcast_shapes(*(part.shape[:-1] for part in parts))
        joined = jnp.concatenate([jnp.broadcast_to(part, (*leading, part.shape[-1])) for part in parts], -1)
        mean = NONLINEAR[self.form](joined @ jnp.asarray(self.weights))
        return jnp.asarray(slope)[..., None] * mean + bias


class Site(NamedTuple):
    name: str
    domain: str
    distribution: str
    mean: Map
    scale: float
    scale_reads: bool  # the scale moves with the mean

    def __call__(self, features, batch, slope=1.0, factor=1.0):
        mean = self.mean(features, batch, slope)
        scale = self.scale * jnp.asarray(factor)
        if self.scale_reads:
            scale = scale * jnp.exp(0.3 * jnp.tanh(mean.sum(-1)))
        return DOMAINS[self.domain].distributions[self.distribution](mean, jnp.broadcast_to(scale, mean.shape[:-1]))


class Leaf(NamedTuple):
    """A state leaf of the carry: `raw` values of one site, or numbers computed from the features of several."""

    name: str
    form: str
    sites: tuple[str, ...]
    width: int

    def value(self, values, domains, clock):
        if self.form == "raw":
            return values[self.sites[0]]
        features = jnp.concatenate([DOMAINS[domains[s]].feature(values[s]) for s in self.sites], -1)
        return {
            "features": lambda: features,
            "tanh": lambda: jnp.tanh(features),
            "times clock": lambda: features * (1.0 + 0.1 * clock),
        }[self.form]()

    def feature(self, value, domains):
        return DOMAINS[domains[self.sites[0]]].feature(value) if self.form == "raw" else value

    def event_dim(self, domains):
        return DOMAINS[domains[self.sites[0]]].event_dim if self.form == "raw" else 1


def random_program(seed: int) -> RandomProgram:
    """The program of a seed."""
    return _Writer(Chooser(seed), seed).program()


class _Writer:
    """Chooses in an order: sizes, latent sites, carry, beginning, emissions, absent steps, parameters, guide."""

    def __init__(self, choose, seed):
        self.c, self.seed = choose, seed

    def program(self):
        self.choose_sizes()
        self.choose_globals()
        self.choose_sites()
        self.choose_emissions()
        self.choose_inputs()
        self.choose_guide()
        model = self.model(self.make_plates)
        states = {name: np.arange(DOMAINS[self.domain_of[name]].states) for name in self.summed}
        ignore = ("z_obs",) if self.global_observed else ()
        if any(e["obs_mask"] for e in self.emissions):
            ignore += tuple(f"{e['name']}_unobserved" for e in self.emissions if e["obs_mask"])
        return RandomProgram(
            seed=self.seed,
            choices=tuple(self.c.made),
            model=model,
            guide=AutoNormal(model) if self.auto else self.guide,
            args=() if self.by_name else (self.data,),
            kwargs=self.data if self.by_name else {},
            params=self.params,
            num_particles=self.K,
            length=self.T,
            sites=tuple(s.name for s in self.steps),
            initial_sites=tuple(s.name for s in self.initials),
            present=self.seen_by_plates(),
            states=states,
            ignore=ignore,
            scored=self.model(self.whole_plates) if self.subsampled else model,
            validated=self.validated,
        )

    # What there is

    def choose_sizes(self):
        c = self.c
        self.T = c.pick("T", (1, 2, 3), (1, 3, 3))
        self.K = c.pick("K", (1, 2, 3), (1, 3, 3))
        B = int(c.rng.integers(2, 4))
        plates = c.pick("plates", ("none", "one", "one at -2", "two", "one, with an undeclared axis"), (5, 5, 1, 2, 1))
        self.plate_dims, self.batch = {
            "none": ((), ()),
            "one": ((("series", B, -1),), (B,)),
            "one at -2": ((("series", B, -2),), (B, 1)),
            "two": ((("outer", 2, -2), ("inner", B, -1)), (2, B)),
            "one, with an undeclared axis": ((("series", B, -1),), (2, B)),
        }[plates]
        aligned = [1] * max([-dim for _, _, dim in self.plate_dims], default=0)
        for _, size, dim in self.plate_dims:
            aligned[dim] = size
        self.aligned = tuple(aligned)  # the shape of one number for each series
        # NumPyro warns where an autoguide meets a batch axis without a plate.
        self.has_free_axis = plates == "one, with an undeclared axis"
        self.auto = not self.has_free_axis and c.chance("AutoNormal", 0.12)
        self.subsampled = len(self.plate_dims) == 1 and not self.auto and c.chance("subsampled", 0.2)
        self.validated = c.chance("validated", 0.3)  # NumPyro's checks of arguments cost a third of the time
        self.params = {}

    def choose_globals(self):
        c = self.c
        self.slope = c.pick("slope", ("1", "param", "global", "global by series"), (6, 2, 2, 1))
        self.noise = c.pick("noise", ("1", "param", "global"), (5, 2, 2))
        if self.slope == "param":
            self.params["slope"] = np.asarray(c.rng.uniform(0.3, 1.0))
        if self.noise == "param":
            self.params["noise"] = np.asarray(c.rng.uniform(0.5, 1.5))
        self.globals = [s for s in ("slope", "noise") if getattr(self, s).startswith("global")]
        self.global_observed = self.slope == "global" and c.chance("an observation of the slope alone", 0.3)
        self.other_scan = c.chance("another scan, whose latents are global", 0.06)
        self.marked = c.chance("markov", 0.2) or self.other_scan
        if self.slope == "global by series" and not self.plate_dims:
            self.slope = "global"

    def choose_sites(self):
        c = self.c
        weights = {"real": 6, "vector": 3, "positive": 3, "unit": 2, "interval": 2, "simplex": 1.5, "ordered": 1, "matrix": 0.7}
        weights |= {"circle": 0.6, "states": 1.2, "switch": 0.8, "count": 0.6}
        if self.auto:
            weights = {name: weight for name, weight in weights.items() if DOMAINS[name].has_gradient}
        names = ("x",) if c.pick("latent sites a step", (1, 2), (3, 2)) == 1 else ("x", "z")
        self.domain_of = {name: c.pick(f"{name} is", tuple(weights), tuple(weights.values())) for name in names}
        can_sum = self.T < 3 and not self.has_free_axis  # the enumeration knows sites of one element
        self.summed = [
            name for name in names if can_sum and DOMAINS[self.domain_of[name]].states and c.chance(f"{name} is summed", 0.6)
        ]
        self.has_clock = c.chance("a time index in the carry", 0.3)
        self.has_control = c.chance("a filtered control in the carry", 0.2)
        self.has_input = c.chance("an input", 0.25) or self.has_control
        self.has_constant = c.chance("a constant in the carry", 0.15)
        self.choose_carry(names)
        available = {leaf.name: leaf.width for leaf in self.leaves}
        if self.has_clock:
            available["clock"] = 1
        if self.has_control:
            available["control"] = 1
        if self.has_constant:
            available["constant"] = 1
        if self.has_input:
            available["input"] = 1
        self.steps = []
        for name in names:
            must = () if c.chance(f"{name} does not read the state", 0.12) else (c.rng.choice([x.name for x in self.leaves]),)
            options = [w for w in available if must or w not in [x.name for x in self.leaves]]
            reads = [w for w in options if w in must or w in c.some(options)]
            self.steps.append(self.site(name, self.domain_of[name], reads, available))
            available[name] = DOMAINS[self.domain_of[name]].width
        self.choose_beginning()
        self.available = available
        self.deterministic = c.pick("deterministic", ("none", "in the body", "after the scan", "both"), (4, 2, 1, 1))

    def choose_carry(self, names):
        c = self.c
        carried = c.some(names, at_least=1)
        if len(carried) == 2 and c.chance("both sites in one leaf", 0.3):
            groups = [tuple(carried)]
        else:
            groups = [(name,) for name in carried]
        self.leaves = []
        for i, group in enumerate(groups):
            forms = ["raw"] * (len(group) == 1) + ["features", "tanh"] + ["times clock"] * self.has_clock
            form = c.pick(f"carry of {'+'.join(group)}", forms, [5, 1, 1, 1][: len(forms)] if forms[0] == "raw" else None)
            self.leaves.append(Leaf(f"leaf{i}", form, group, sum(DOMAINS[self.domain_of[s]].width for s in group)))
        alone = len(self.leaves) == 1 and not (self.has_clock or self.has_control or self.has_constant)
        self.carry_form = c.pick("carry", ("bare", "tuple", "dict", "nested") if alone else ("tuple", "dict", "nested"))

    def choose_beginning(self):
        c = self.c
        carried = list(dict.fromkeys(name for leaf in self.leaves for name in leaf.sites))
        self.start, self.initials, widths = {}, [], {}
        for name in carried:
            how = c.pick(f"{name} starts from", ("site", "constant", "other") if self.initials else ("site", "constant"), None)
            domain = DOMAINS[self.domain_of[name]]
            if how == "site":
                reads = [w for w in widths if c.rng.random() < 0.5]
                self.initials.append(self.site(f"{name}_0", self.domain_of[name], reads, widths))
                self.domain_of[f"{name}_0"] = self.domain_of[name]
                widths[f"{name}_0"] = domain.width
            self.start[name] = how, self.map([w for w in widths if how == "other"], widths, domain.width)
        if self.initials and c.chance("a second site at the start", 0.15):
            self.initials.append(self.site("w_0", "real", [w for w in widths if c.rng.random() < 0.5], widths))
            self.domain_of["w_0"] = "real"
            widths["w_0"] = 1
            # It is read by whatever starts from no site of its own, or shifts a leaf.
            self.shifts = True
        else:
            self.shifts = False
        self.summed += [f"{name}_0" for name in self.summed if f"{name}_0" in self.domain_of]
        self.first_emission = None
        if self.initials and c.chance("the start is observed", 0.3):
            distribution = c.pick("distribution of what is observed of the start", ("Normal", "Poisson", "Normal to_event"))
            self.first_emission = distribution, self.map(list(widths), widths, EMISSIONS[distribution].width)
        if self.shifts and not any(how in ("constant", "other") for how, _ in self.start.values()):
            # Shift a leaf that is made of features.
            self.shifts = any(leaf.form != "raw" for leaf in self.leaves)
            if not self.shifts:
                self.first_emission = None
                self.initials.pop()

    def map(self, reads, widths, width):
        c = self.c
        n = sum(widths[name] for name in reads)
        weights = c.numbers(n, width, scale=0.8 / max(n, 1) ** 0.5)
        bias = c.numbers(*(self.aligned if self.aligned and c.rng.random() < 0.3 else ()), width, scale=0.4)
        form = list(NONLINEAR)[c.rng.choice(len(NONLINEAR), p=[0.5, 0.2, 0.2, 0.1])] if reads else "constant"
        return Map(tuple(reads), weights, bias, form)

    def site(self, name, domain, reads, widths):
        c = self.c
        distribution = c.pick(f"distribution of {name}", tuple(DOMAINS[domain].distributions))
        mean = self.map(reads, widths, DOMAINS[domain].width)
        scale_reads = bool(c.rng.random() < 0.2)
        c.made.append(f"{name} reads {'+'.join(reads) or 'nothing'} ({mean.form}{', in the scale too' if scale_reads else ''})")
        return Site(name, domain, distribution, mean, float(c.rng.uniform(0.4, 0.9)), scale_reads)

    def choose_emissions(self):
        c = self.c
        self.emits = where = c.pick(
            "emissions", ("one in the body", "two in the body", "after", "both", "none"), (6, 2, 3, 1.5, 0.5)
        )
        names = {"one in the body": 1, "two in the body": 2, "both": 1}.get(where, 0)
        latent = [s.name for s in self.steps]
        previous = [leaf.name for leaf in self.leaves]
        clocks = [w for w in ("clock", "control", "input", "constant") if w in self.available]
        self.emissions = []
        for i in range(names):
            name = f"y{i}"
            distribution = c.pick(f"distribution of {name}", tuple(EMISSIONS))
            reads = c.some(latent, at_least=1) + [w for w in clocks if c.rng.random() < 0.2]
            reads += previous if c.chance(f"{name} reads the state before", 0.2) else []
            sensors = c.chance(f"{name} has two sensors", 0.2)
            how = c.pick(f"{name} is masked", ("no", "NaN"), (3, 1))
            scale = 0.5 if c.chance(f"{name} is scaled", 0.15) else None
            obs_mask = how == "NaN" and not sensors and not self.auto and c.chance(f"{name} has obs_mask", 0.5)
            self.emissions.append(
                self.emission(name, distribution, reads, self.available, sensors, how == "NaN", scale) | {"obs_mask": obs_mask}
            )
        self.factor = self.map([*latent, *previous], self.available, 1) if c.chance("a factor", 0.1) else None
        self.later = None
        if where in ("after", "both"):
            distribution = c.pick("distribution after the scan", tuple(EMISSIONS))
            shared = [s for s in latent if all(name in self.domain_of for name in (f"{s}_0",))]
            first = bool(shared) and c.chance("with the start in front", 0.4)
            reads = c.some(shared if first else latent, at_least=1)
            how = c.pick("after the scan", ("plate",) if self.auto else ("plain", "plate", "to_event")[: 3 - bool(self.batch)])
            masked = c.pick("after the scan is masked", ("no", "NaN"), (2, 1)) == "NaN"
            later = self.emission(
                "v", distribution, reads, self.available, False, masked and how != "to_event", None, int(first)
            )
            self.later = later | {"how": how, "first": first}
        self.output = c.pick(
            "outputs", ("dict", "tuple", "array") if self.later or self.deterministic != "none" else ("none", "dict")
        )
        if self.output == "array" and len(self.steps) == 2:
            self.output = "tuple"

    def emission(self, name, distribution, reads, widths, sensors, masked, scale, extra=0):
        c = self.c
        emission, spec = EMISSIONS[distribution], self.map(reads, widths, EMISSIONS[distribution].width)
        shape = ((2,) if sensors else ()) + self.batch
        data = emission.data(c.rng, (self.T + extra, *shape, *emission.event))
        is_real = np.issubdtype(data.dtype, np.floating)
        seen = c.rng.random((self.T + extra, *shape)) < 0.6 if masked else None
        if masked and is_real:
            data = np.where(seen.reshape(*seen.shape, *(1,) * len(emission.event)), data, np.nan)
        gains = c.numbers(2, *(1,) * (len(self.batch) + 1), scale=1.0) if sensors else None
        c.made.append(f"{name} reads {'+'.join(reads)} ({spec.form})")
        return {
            "name": name,
            "distribution": distribution,
            "mean": spec,
            "data": data,
            "seen": seen,
            "gains": gains,
            "scale": scale,
        }

    def choose_inputs(self):
        c = self.c
        self.data = {}
        self.condition = [e["name"] for e in self.emissions if e["seen"] is None] if c.chance("data by condition", 0.1) else []
        for e in [*self.emissions, *([self.later] if self.later else [])]:
            if e["name"] not in self.condition:
                self.data[e["name"]] = e["data"]
            if e["seen"] is not None:
                self.data[f"seen_{e['name']}"] = e["seen"]
        if self.has_input:
            shape = self.batch if self.batch and c.chance("an input for each series", 0.3) else ()
            self.data["input"] = c.numbers(self.T, *shape)
        if self.first_emission:
            emission = EMISSIONS[self.first_emission[0]]
            self.data["y_first"] = emission.data(c.rng, (*self.batch, *emission.event))
        self.choose_presence()
        self.in_body = [n for n in self.data if n in ("input", "present") or n.removeprefix("seen_").startswith("y")]
        self.in_body = [n for n in self.in_body if n != "y_first"]
        self.looked_up = [n for n in self.in_body if self.has_clock and c.rng.random() < 0.25]
        if self.looked_up:
            c.made.append(f"looked up by the time index: {'+'.join(self.looked_up)}")
        self.in_body = [n for n in self.in_body if n not in self.looked_up]
        if self.in_body:
            self.xs_form = c.pick("xs", ("array", "tuple", "dict") if len(self.in_body) == 1 else ("tuple", "dict"))
        else:
            self.xs_form = "none"
        self.gives_length = self.xs_form == "none" or c.chance("length= beside xs", 0.2)
        self.data["T"] = self.T
        self.by_name = c.chance("arguments by name", 0.3)
        # Whole series are masked, and what is observed after the scan would have to be too.
        around = ("nothing", "scale") if self.emits in ("after", "both") else ("nothing", "scale", "mask")
        self.around = c.pick("around the scan", around, (3, 1, 1)[: len(around)])
        if self.around == "mask":
            self.off = self.c.rng.random(self.aligned) < 0.5

    def choose_presence(self):
        c = self.c
        self.hold = None
        how = c.pick("absent steps", ("none", "end", "end, held", "late start, held", "any, held"), (8, 1, 1, 1, 1))
        if how == "none":
            return
        number = max(int(np.prod(self.aligned)), 1)
        lengths = c.rng.integers(1, self.T + 1, number)
        t = np.arange(self.T)[:, None]
        present = {
            "end": lambda: t < lengths,
            "end, held": lambda: t < lengths,
            "late start, held": lambda: t >= self.T - lengths,
            "any, held": lambda: c.rng.random((self.T, number)) < 0.6,
        }[how]()
        self.data["present"] = present.reshape(self.T, *self.aligned)
        self.hold = "held" in how

    def seen_by_plates(self):
        sizes = tuple(size for _, size, _ in self.plate_dims)
        present = self.data.get("present")
        if self.around == "mask":
            present = (True if present is None else present) & ~self.off
        return None if present is None else np.broadcast_to(present, (self.T, *self.aligned)).reshape(self.T, *sizes)

    def choose_guide(self):
        c = self.c
        if self.auto:
            return
        self.guide_plates = c.pick("guide", ("in the plates", "without plates"), (3, 1)) == "in the plates" and self.plate_dims
        self.guide_time = self.guide_plates == () and not self.batch and c.chance("guide in a plate for time", 0.2)
        self.guide_sites, widths = [], {}
        sites = [s for s in self.initials + self.steps if s.name not in self.summed]
        self.guide_reads_globals = bool(self.globals) and c.chance("the guide reads global sites", 0.3)
        for site in sites:
            domain = DOMAINS[site.domain]
            distribution = c.pick(f"proposal of {site.name}", tuple(domain.distributions))
            is_step = site in self.steps
            batch = ((self.T,) if is_step else ()) + self.batch
            loc = c.numbers(*batch, domain.width)
            options = [n for n in widths if not n.endswith("_0") or not is_step]
            reads = [n for n in options if c.rng.random() < 0.3]
            scale = c.rng.uniform(0.6, 1.2, batch)
            if c.rng.random() < 0.5:
                self.params[f"loc_{site.name}"] = loc
                self.params[f"scale_{site.name}"] = scale
                c.made.append(f"the guide learns {site.name}")
            if reads:
                c.made.append(f"in the guide {site.name} reads {'+'.join(reads)}")
            spec = self.map(reads, widths, domain.width)._replace(bias=np.zeros(domain.width))
            self.guide_sites.append((site.name, site.domain, distribution, loc, scale, spec, batch))
            if is_step or not site.name.endswith("w_0"):
                widths[site.name] = domain.width

    # The programs

    def make_plates(self):
        return [
            numpyro.plate(name, 2 * size if self.subsampled else size, size if self.subsampled else None, dim=dim)
            for name, size, dim in self.plate_dims
        ]

    def whole_plates(self):
        return [numpyro.plate(name, size, dim=dim) for name, size, dim in self.plate_dims]

    def model(self, make_plates):
        def model(*args, **kwargs):
            self.run(kwargs or args[0], make_plates())

        if self.condition:
            rows = {e["name"]: e["data"] for e in self.emissions if e["name"] in self.condition}
            return lambda *args, **kwargs: handlers.condition(model, {name: jnp.asarray(data) for name, data in rows.items()})(
                *args, **kwargs
            )
        return model

    def sample_globals(self, plates, priors):
        """Slope and noise, of the model (`priors`) or of the guide."""
        shift = 0.0 if priors else 0.1
        values = {}
        if self.other_scan and priors:
            step = lambda u, _: ((u := numpyro.sample("u", dist.Normal(0.5 * u, 0.4))), u)
            values["u"] = scan(step, 0.0, None, length=2)[1]
        elif self.other_scan:
            values["u"] = numpyro.sample("u", dist.Normal(jnp.array([0.1, -0.2]), 0.5))
        for name in ("slope", "noise"):
            how = getattr(self, name)
            distribution = dist.Normal(0.6 + shift, 0.3) if name == "slope" else dist.LogNormal(shift, 0.2)
            if how == "param" and priors:
                constraint = dist.constraints.real if name == "slope" else POSITIVE
                values[name] = numpyro.param(name, jnp.asarray(0.7), constraint=constraint)
            elif how == "global":
                values[name] = numpyro.sample(name, distribution)
            elif how == "global by series":
                with within(plates):
                    values[name] = numpyro.sample(name, distribution.expand(self.aligned))
        if self.global_observed and priors:
            numpyro.sample("z_obs", dist.Normal(values["slope"], 0.5), obs=0.7)
        return values

    def run(self, data, plates):
        values = self.sample_globals(plates, True)
        slope, noise = values.get("slope", 1.0), values.get("noise", 1.0)
        if "u" in values:
            slope = slope + 0.1 * values["u"].sum()
        first, features = {}, {}
        with within(plates):
            for site in self.initials:
                first[site.name] = numpyro.sample(site.name, site(features, self.batch, 1.0, noise))
                features[site.name] = DOMAINS[site.domain].feature(first[site.name])
            if self.first_emission:
                distribution, mean = self.first_emission
                numpyro.sample("y_first", EMISSIONS[distribution].distribution(mean(features, self.batch)), obs=data["y_first"])
        if self.deterministic in ("after the scan", "both") and first:
            numpyro.deterministic("d_0", sum(f.sum(-1) for f in features.values()))

        init = self.first_carry(first, features)
        xs = [jnp.asarray(data[name]) for name in self.in_body]
        xs = {
            "none": lambda: None,
            "array": lambda: xs[0],
            "tuple": lambda: tuple(xs),
            "dict": lambda: dict(zip(self.in_body, xs, strict=True)),
        }[self.xs_form]()
        step = self.step(data, plates, slope, noise)
        length = data["T"] if self.gives_length else None
        around = contextlib.nullcontext()
        if self.around == "scale":
            around = handlers.scale(scale=0.7)
        elif self.around == "mask":
            around = handlers.mask(mask=jnp.asarray(~self.off))
        with around:
            _, outputs = (markov if self.marked else scan)(step, init, xs, length=length)
        if self.output == "none":
            return
        names = [s.name for s in self.steps]
        if self.output != "dict":
            outputs = dict(zip(names, outputs if self.output == "tuple" else (outputs,), strict=True))
        if self.deterministic in ("after the scan", "both"):
            numpyro.deterministic("d_all", sum(DOMAINS[self.domain_of[n]].feature(outputs[n]).sum(-1) for n in names))
        if self.later:
            self.observe_later(data, plates, first, outputs)

    def first_carry(self, first, features):
        values = {}
        for name, (how, mean) in self.start.items():
            domain = DOMAINS[self.domain_of[name]]
            shift = 0.5 * features["w_0"] if self.shifts else 0.0
            values[name] = first[f"{name}_0"] if how == "site" else domain.value(mean(features, self.batch) + shift)
        leaves = {leaf.name: leaf.value(values, self.domain_of, 0) for leaf in self.leaves}
        if self.shifts:
            leaves = {
                leaf.name: leaves[leaf.name] if leaf.form == "raw" else leaves[leaf.name] + 0.3 * features["w_0"]
                for leaf in self.leaves
            }
        clocks = {"clock": 0} if self.has_clock else {}
        clocks |= {"control": jnp.asarray(0.3 * np.ones(np.shape(self.data["input"])[1:]))} if self.has_control else {}
        clocks |= {"constant": jnp.asarray(0.4)} if self.has_constant else {}
        return self.pack(leaves, clocks)

    def pack(self, leaves, clocks):
        every = {**clocks, **leaves}
        return {
            "bare": lambda: leaves["leaf0"],
            "tuple": lambda: tuple(every.values()),
            "dict": lambda: every,
            "nested": lambda: (leaves, {"clocks": tuple(clocks.values())}),
        }[self.carry_form]()

    def unpack(self, carry):
        names = [leaf.name for leaf in self.leaves]
        kept = {"clock": self.has_clock, "control": self.has_control, "constant": self.has_constant}
        clocks = [name for name, there in kept.items() if there]
        every = {
            "bare": lambda: {"leaf0": carry},
            "tuple": lambda: dict(zip(clocks + names, carry, strict=True)),
            "dict": lambda: carry,
            "nested": lambda: {**carry[0], **dict(zip(clocks, carry[1]["clocks"], strict=True))},
        }[self.carry_form]()
        return {name: every[name] for name in names}, {name: every[name] for name in clocks}

    def step(self, data, plates, slope, noise):
        def step(carry, x):
            old, clocks = self.unpack(carry)
            if self.xs_form == "array":
                x = {self.in_body[0]: x}
            elif self.xs_form == "tuple":
                x = dict(zip(self.in_body, x, strict=True))
            here = dict(x or {}) | {name: jnp.asarray(data[name])[clocks["clock"]] for name in self.looked_up}
            if self.has_control:
                clocks = clocks | {"control": 0.7 * clocks["control"] + here["input"]}
            features = {leaf.name: leaf.feature(old[leaf.name], self.domain_of) for leaf in self.leaves}
            features |= {name: 0.2 * jnp.asarray(clock)[..., None] for name, clock in clocks.items()}
            if self.has_input:
                features["input"] = here["input"][..., None]
            present = here.get("present")
            values = {}
            with within(plates), handlers.mask(mask=present) if present is not None else contextlib.nullcontext():
                for site in self.steps:
                    values[site.name] = numpyro.sample(site.name, site(features, self.batch, slope, noise))
                    features[site.name] = DOMAINS[site.domain].feature(values[site.name])
                for emission in self.emissions:
                    self.observe(emission, features, here)
                if self.factor:
                    numpyro.factor("factor", -0.3 * jnp.abs(self.factor(features, self.batch)[..., 0]))
                if self.deterministic in ("in the body", "both"):
                    read = [*(s.name for s in self.steps), *(leaf.name for leaf in self.leaves)]
                    numpyro.deterministic("d", sum(features[name].sum(-1) for name in read))
            new = {leaf.name: leaf.value(values, self.domain_of, clocks.get("clock", 0)) for leaf in self.leaves}
            if self.hold:
                new = {leaf.name: self.held(leaf, present, new[leaf.name], old[leaf.name]) for leaf in self.leaves}
            if self.has_clock:
                clocks = clocks | {"clock": clocks["clock"] + 1}
            output = {
                "none": lambda: None,
                "dict": lambda: values,
                "tuple": lambda: tuple(values.values()),
                "array": lambda: values["x"],
            }[self.output]()
            return self.pack(new, clocks), output

        return step

    def held(self, leaf, present, new, old):
        present = jnp.asarray(present)
        return jnp.where(present.reshape(*present.shape, *(1,) * leaf.event_dim(self.domain_of)), new, old)

    def observe(self, emission, features, here):
        mean = emission["mean"](features, self.batch)
        obs = here.get(emission["name"])
        with contextlib.ExitStack() as stack:
            if emission["gains"] is not None:
                mean = jnp.asarray(emission["gains"]) * mean
                stack.enter_context(numpyro.plate(f"sensors_{emission['name']}", 2, dim=-1 - len(self.batch)))
            if emission["scale"] is not None:
                stack.enter_context(handlers.scale(scale=emission["scale"]))
            seen = here.get(f"seen_{emission['name']}")
            distribution = EMISSIONS[emission["distribution"]].distribution(mean)
            if seen is not None and emission["obs_mask"]:
                numpyro.sample(emission["name"], distribution, obs=jnp.nan_to_num(obs), obs_mask=seen)
                return
            if seen is not None:
                stack.enter_context(handlers.mask(mask=seen))
            numpyro.sample(emission["name"], distribution, obs=obs)

    def observe_later(self, data, plates, first, outputs):
        emission = self.later
        features = {}
        for name in emission["mean"].reads:
            value = outputs[name]
            if emission["first"]:
                value = jnp.concatenate([first[f"{name}_0"][None], value])
            features[name] = DOMAINS[self.domain_of[name]].feature(value)
        rows = len(emission["data"])
        distribution = EMISSIONS[emission["distribution"]].distribution(emission["mean"](features, (rows, *self.batch)))
        masks = [emission["seen"]] if emission["seen"] is not None else []
        if "present" in data:
            present = jnp.asarray(data["present"]).reshape(self.T, *(1,) * (len(self.batch) - len(self.aligned)), *self.aligned)
            masks.append(jnp.concatenate([jnp.ones_like(present[:1]), present]) if emission["first"] else present)
        with within(plates), contextlib.ExitStack() as stack:
            if emission["how"] == "plate":
                stack.enter_context(numpyro.plate("time", rows, dim=-1 - len(self.batch)))
            for mask in masks:
                stack.enter_context(handlers.mask(mask=jnp.asarray(mask)))
            if emission["how"] == "to_event" and not masks:
                distribution = distribution.to_event(1)
            numpyro.sample("v", distribution, obs=data["v"])

    def guide(self, *args, **kwargs):
        plates = self.whole_plates() if self.guide_plates else []
        values = self.sample_globals(self.whole_plates(), False)
        shift = 0.1 * values["slope"] if self.guide_reads_globals and "slope" in values else 0.0
        features = {}
        with within(plates):
            for name, domain, distribution, loc, scale, spec, batch in self.guide_sites:
                if f"loc_{name}" in self.params:
                    loc = numpyro.param(f"loc_{name}", jnp.zeros(loc.shape))
                    scale = numpyro.param(f"scale_{name}", jnp.ones(scale.shape), constraint=POSITIVE)
                mean = jnp.asarray(loc) + spec(features, batch) + jnp.asarray(shift)[..., None]
                time = numpyro.plate("time", self.T, dim=-1) if self.guide_time and len(batch) == 1 else None
                with time or contextlib.nullcontext():
                    value = numpyro.sample(name, DOMAINS[domain].distributions[distribution](mean, jnp.asarray(scale)))
                features[name] = DOMAINS[domain].feature(value)


def within(plates):
    """All plates at once."""
    stack = contextlib.ExitStack()
    for plate in plates:
        stack.enter_context(plate)
    return stack
