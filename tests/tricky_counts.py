"""Write programs of counts whose support moves with the state, the inputs or the clock, and their log evidence in SciPy."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from scipy import special, stats

from tricky import Chooser, Proposal, Tricky, plates_of

GRID = np.arange(200)  # the oracle knows no bounds: what no count can reach has no mass

TOTALS = {  # of NumPy or JAX, the count before, the clock and an input
    "n": lambda xp, n, t, u: n,
    "n + 2": lambda xp, n, t, u: n + 2,
    "min(n + 2, 5)": lambda xp, n, t, u: xp.minimum(n + 2, 5),
    "2 n": lambda xp, n, t, u: 2 * n,
    "t + 2": lambda xp, n, t, u: 0 * n + t + 2,
    "input": lambda xp, n, t, u: 0 * n + u,
    "min(n, input)": lambda xp, n, t, u: xp.minimum(n, u),
    "n + input": lambda xp, n, t, u: n + u,
    "n // 2 + 3": lambda xp, n, t, u: n // 2 + 3,
    "max(n - 1, 0) + 1": lambda xp, n, t, u: xp.maximum(n - 1, 0) + 1,
    "where(n > 2, n, 3)": lambda xp, n, t, u: xp.where(n > 2, n, 3),
}
TOTAL_WEIGHTS = (4, 3, 1, 1, 1, 2, 1, 1, 1, 1, 1)


class Distribution(NamedTuple):
    """In NumPyro and in SciPy: functions of the total, a probability, a rate. `declared`: the largest count is by `infer`."""

    distribution: Callable
    log_pmf: Callable
    declared: bool = False


LAWS = {
    "Binomial": Distribution(lambda n, p, rate: dist.Binomial(n, p), lambda k, n, p, rate: stats.binom.logpmf(k, n, p)),
    "BetaBinomial": Distribution(
        lambda n, p, rate: dist.BetaBinomial(2.0 * p + 0.5, 1.5, n),
        lambda k, n, p, rate: stats.betabinom.logpmf(k, n, 2.0 * p + 0.5, 1.5),
    ),
    "DiscreteUniform": Distribution(
        lambda n, p, rate: dist.DiscreteUniform(0 * n, n), lambda k, n, p, rate: stats.randint.logpmf(k, 0, n + 1)
    ),
    "Poisson": Distribution(lambda n, p, rate: dist.Poisson(rate), lambda k, n, p, rate: stats.poisson.logpmf(k, rate), True),
    "Geometric": Distribution(
        lambda n, p, rate: dist.GeometricProbs(1 / (1 + rate)),
        lambda k, n, p, rate: stats.geom.logpmf(k + 1, 1 / (1 + rate)),
        True,
    ),
    "NegativeBinomial": Distribution(
        lambda n, p, rate: dist.NegativeBinomial2(rate, 3.0),
        lambda k, n, p, rate: stats.nbinom.logpmf(k, 3.0, 3.0 / (3.0 + rate)),
        True,
    ),
}
LAW_WEIGHTS = (6, 1, 1, 2, 0.5, 0.5)
UNIFORM_AROUND = Distribution(
    lambda n, p, rate: dist.DiscreteUniform(jnp.maximum(n - 1, 0), n + 1),
    lambda k, n, p, rate: stats.randint.logpmf(k, np.maximum(n - 1, 0), n + 2),  # the grid begins at 0
)
EMISSIONS = {
    "Binomial": (lambda n: dist.Binomial(n, 0.5), lambda y, n: stats.binom.logpmf(y, n, 0.5)),
    "Poisson": (lambda n: dist.Poisson(0.8 * n + 0.2), lambda y, n: stats.poisson.logpmf(y, 0.8 * n + 0.2)),
    "Normal": (lambda n: dist.Normal(1.0 * n, 0.8), lambda y, n: stats.norm.logpdf(y, n, 0.8)),
}
WRONGS = (
    "Poisson without a largest count",
    "recruits without a largest count",
    "a start without a largest count",
    "an interval around the count before",
    "the total reads a continuous site",
)


class Design(NamedTuple):
    """All that was chosen, for both halves of a program. `recruits` are a second site, which is added."""

    T: int
    plates: tuple[int, ...]
    distribution: Distribution
    total: Callable
    most: int | None
    probability: str
    recruits: Distribution | None
    recruits_most: int | None
    start: str
    start_number: np.ndarray
    start_most: int | None
    emission: tuple
    has_rate: bool
    u: np.ndarray
    numbers_are_given: bool  # the start and the inputs are arguments of the model, not constants of it
    present: np.ndarray

    def probability_of(self, xp, n, x):
        if self.probability == "reads x":
            return 1 / (1 + xp.exp(-x)) + 0.0 * n
        return 0.3 + 0.4 * (n > 2) if self.probability == "reads the count" else 0.7 + 0.0 * n

    def rate_of(self, xp, n, x):
        return (0.5 + 0.4 * n) * (xp.exp(0.4 * x) if self.has_rate else 1.0)


def random_count(seed: int) -> Tricky:
    """A chain of counts that the guide leaves out, at times beside a continuous site that it does not."""
    c = Chooser(4, seed)
    fault = "" if c.chance("legitimate", 0.65) else c.pick("what is wrong", WRONGS)
    plates = c.pick("series", {"1": (), "2": (2,)}, (3, 2))
    T = c.pick("T", (2, 3, 4), (1, 2, 1))
    distribution, total = _moves(c, fault)
    has_rate = total is None or c.chance("a continuous site", 0.25)
    probabilities = ("constant", "reads the count") + ("reads x",) * has_rate
    adds = fault.startswith("recruits") or (not fault and c.chance("recruits", 0.3))
    recruits = c.pick("recruits are", {name: LAWS[name] for name in ("Poisson", "Geometric")}) if adds else None
    starts = ("a number", "Binomial", "DiscreteUniform", "Poisson")
    start = "Poisson" if fault.startswith("a start") else c.pick("starts from", starts, (3, 2, 1, 1))
    design = Design(
        T=T,
        plates=plates,
        distribution=distribution,
        total=total,
        most=_most(c, distribution, fault.startswith("Poisson")),
        probability=c.pick("probability", probabilities),
        recruits=recruits,
        recruits_most=_most(c, recruits, fault.startswith("recruits")),
        start=start,
        start_number=np.asarray(c.rng.integers(2, 5, plates)),
        start_most=None if start != "Poisson" or fault.startswith("a start") else 6,
        emission=c.pick("y is", EMISSIONS),
        has_rate=has_rate,
        u=c.rng.integers(1, 5, (T, *plates)),
        numbers_are_given=c.chance("the numbers are arguments", 0.5),
        present=c.rng.random((T, *plates)) < 0.7 if c.chance("masked steps", 0.15) else np.ones((T, *plates), bool),
    )
    y = _simulate(design, c.rng)
    proposals = {"x": Proposal()} if has_rate else {}
    given = (design.u, design.start_number) if design.numbers_are_given else ()
    args = tuple(jnp.asarray(a) for a in (y, design.present, *given))
    program = Tricky(
        "counts", seed, tuple(c.made), not fault, _model(design), args, proposals, c.pick("K", (1, 2, 3)), T, plates
    )
    return program._replace(right=lambda program, particles: [log_evidence(design, program, y, particles)])


def _moves(c, fault):
    """The distribution of the counts, and the total that it takes of the state; None: of the continuous site."""
    if fault.startswith("Poisson"):
        return LAWS["Poisson"], TOTALS["n"]
    if fault.startswith("an interval"):
        return UNIFORM_AROUND, TOTALS["n"]
    if fault.startswith("the total"):
        return LAWS["Binomial"], None
    distribution = LAWS["Binomial"] if fault else c.pick("n is", LAWS, LAW_WEIGHTS)
    is_total_read = not distribution.declared and not fault.startswith("a start")
    return distribution, c.pick("of", TOTALS, TOTAL_WEIGHTS) if is_total_read else TOTALS["n"]


def _most(c, distribution, unknown):
    if distribution is None or not distribution.declared or unknown:
        return None
    return c.pick("largest count", (4, 6))


def _model(design):
    constants = design.u, design.start_number if design.plates else int(design.start_number)

    def model(y, present, *given):
        u, start_number = given if design.numbers_are_given else constants

        def step(carry, inputs):
            y_t, u_t, m = inputs
            n, x, t = carry
            with plates_of(design.plates), handlers.mask(mask=m):
                new_x = x
                if design.has_rate:
                    new_x = numpyro.sample("x", dist.Normal(0.8 * x, 0.5))
                total = (
                    jnp.floor(3 * jnp.exp(0.3 * new_x)).astype(int) if design.total is None else design.total(jnp, n, t, u_t)
                )
                p, rate = design.probability_of(jnp, n, new_x), design.rate_of(jnp, n, new_x)
                new = numpyro.sample("n", design.distribution.distribution(total, p, rate), infer=_infer(design.most))
                if design.recruits is not None:
                    rate = 0.7 + 0.0 * rate
                    new = new + numpyro.sample(
                        "r", design.recruits.distribution(n, p, rate), infer=_infer(design.recruits_most)
                    )
                new = new if jnp.issubdtype(new.dtype, jnp.integer) else new.astype(int)  # NumPyro draws some as floats
                numpyro.sample("y", design.emission[0](new), obs=y_t)
            if not design.present.all():
                new, new_x = jnp.where(m, new, n), jnp.where(m, new_x, x)
            return (new, new_x, t + 1), None

        n = start_number
        with plates_of(design.plates):
            if design.start == "Binomial":
                n = numpyro.sample("n_0", dist.Binomial(start_number, 0.8))
            if design.start == "DiscreteUniform":
                n = numpyro.sample("n_0", dist.DiscreteUniform(0 * start_number, start_number))
            if design.start == "Poisson":
                n = numpyro.sample("n_0", dist.Poisson(1.0 * start_number), infer=_infer(design.start_most))
        scan(step, (n, jnp.full(design.plates, 0.2), 0), (y, jnp.asarray(u), present))

    return model


def _infer(most):
    return {} if most is None else {"max_count": most}


# The same in NumPy, for one series.


def _log_start(design, s):
    number = design.start_number[s]
    if design.start == "a number":
        return np.where(number == GRID, 0.0, -np.inf)
    if design.start == "Binomial":
        return stats.binom.logpmf(GRID, number, 0.8)
    if design.start == "DiscreteUniform":
        return stats.randint.logpmf(GRID, 0, number + 1)
    return _up_to(stats.poisson.logpmf(GRID, number), design.start_most)


def _up_to(log_pmf, most):
    return log_pmf if most is None else np.where(most >= GRID, log_pmf, -np.inf)


def _log_step(design, t, s, x):
    """From each count to each other, given the continuous site: (before, after)."""
    n = GRID[:, None]
    total = n * 0 + int(np.floor(3 * np.exp(0.3 * x))) if design.total is None else design.total(np, n, t, design.u[(t, *s)])
    p, rate = design.probability_of(np, n, x), design.rate_of(np, n, x)
    matrix = _up_to(design.distribution.log_pmf(GRID[None], total, p, rate), design.most)
    if design.recruits is None:
        return matrix
    added = np.exp(_up_to(design.recruits.log_pmf(GRID, None, None, 0.7), design.recruits_most))
    by_sum = np.array([np.convolve(row, added)[: len(GRID)] for row in np.exp(matrix)])
    with np.errstate(divide="ignore"):
        return np.log(by_sum)


def log_evidence(design: Design, program: Tricky, y: np.ndarray, particles: dict) -> float:
    """Of all series together, by the forward recursion over particles of the continuous site and counts."""
    total = 0.0
    loc, scale = program.proposal_of("x") if design.has_rate else (None, None)
    for s in np.ndindex(*design.plates):
        x_before, log_alpha = np.array([0.2]), _log_start(design, s)[None]
        for t in range(design.T):
            if not design.present[(t, *s)]:
                continue
            x_now, log_q = np.array([0.0]), np.zeros(1)
            log_x = np.zeros((len(x_before), 1))
            if design.has_rate:
                x_now = np.asarray(particles["x"])[(t, slice(None), *s)]
                log_q = stats.norm.logpdf(x_now, loc[(t, *s)], scale) + np.log(len(x_now))
                log_x = stats.norm.logpdf(x_now, 0.8 * x_before[:, None], 0.5)
            moved = special.logsumexp(log_alpha[:, None] + log_x[:, :, None], 0)
            steps = np.stack([_log_step(design, t, s, x) for x in x_now])
            log_alpha = special.logsumexp(moved[:, :, None] + steps, 1) - log_q[:, None]
            log_alpha = log_alpha + design.emission[1](y[(t, *s)], GRID)
            x_before = x_now
        total += special.logsumexp(log_alpha)
    return float(total)


def _simulate(design, rng):
    """Data that are possible."""
    y = np.zeros((design.T, *design.plates), int)
    for s in np.ndindex(*design.plates):
        n = _draw(rng, _log_start(design, s))
        for t in range(design.T):
            if design.present[(t, *s)]:
                n = _draw(rng, _log_step(design, t, s, 0.2)[n])
            y[(t, *s)] = rng.binomial(n, 0.5)
    return y


def _draw(rng, log_pmf):
    p = np.exp(log_pmf)
    return rng.choice(GRID, p=p / p.sum())
