"""Write programs whose series, or times, read each other without a slope that tells so, and ones that only look like it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax
from numpyro.contrib.control_flow import scan

from tricky import Chooser, Proposal, Tricky, emit, plates_of

TABLE = np.array([0.5, -0.4, 1.1, 0.2])
PER_SERIES = np.array([0.3, -0.6, 0.9, -0.2, 0.5])
MATRIX = np.array([[0.6, -0.3], [0.2, 0.8]])


@jax.custom_jvp
def slopeless_mean(c):
    return c.mean(0) + 0 * c


@slopeless_mean.defjvp
def _(primals, tangents):
    return slopeless_mean(*primals), jnp.zeros_like(primals[0])


@jax.custom_jvp
def straight_through(c):
    return jnp.round(c)


@straight_through.defjvp
def _(primals, tangents):
    return straight_through(*primals), tangents[0]


def each(function):
    """Of one number, for all."""
    return lambda c: jnp.vectorize(function)(c)


def index(c, size=4):
    return jnp.clip(jnp.floor(2 * c).astype(int) + 1, 0, size - 1)


def loop_over_rows(c):
    """The mean of the rows before, in a loop."""
    return lax.scan(lambda total, row: (total + row, total), jnp.zeros_like(c[0]), c)[1]


# Functions of (S, *event), each row of which reads its own: they are the same for every S.
OWN = {
    "sin": jnp.sin,
    "sign": jnp.sign,
    "> 0.3": lambda c: 1.0 * (c > 0.3),
    "round": jnp.round,
    "floor": jnp.floor,
    "round, straight through": straight_through,
    "clip": lambda c: jnp.clip(c, -0.2, 0.5),
    "where": lambda c: jnp.where(c > 0, c, 0.1),
    "far away": lambda c: jnp.where(jnp.abs(c) > 50, 0.1 * c, c),
    "remainder": lambda c: c % 0.5,
    "stop_gradient": lax.stop_gradient,
    "cond": each(lambda a: lax.cond(a > 0, jnp.sin, lambda a: a**2, a)),
    "switch": each(lambda a: lax.switch(index(a, 3), [jnp.sin, jnp.cos, jnp.tanh], a)),
    "while_loop": each(lambda a: lax.while_loop(lambda b: jnp.abs(b) > 0.3, lambda b: 0.5 * b, a)),
    "fori_loop": each(lambda a: lax.fori_loop(0, 3, lambda i, b: jnp.sin(b) + 0.1 * i, a)),
    "inner scan": each(lambda a: lax.scan(lambda b, z: (jnp.tanh(b + z), None), a, jnp.asarray(TABLE))[0]),
    "fori_loop on all": lambda c: lax.fori_loop(0, 3, lambda i, b: jnp.sin(b) + 0.1 * i, c),
    "map over rows": lambda c: lax.map(jnp.sin, c),
    "vmap over rows": lambda c: jax.vmap(lambda row: row * (row > 0))(c),
    "jit": jax.jit(lambda c: jnp.round(c) + c),
    "checkpoint": jax.checkpoint(lambda c: jnp.tanh(c) + jnp.floor(c)),
    "one-hot": lambda c: jax.nn.one_hot(index(c), len(TABLE)) @ jnp.asarray(TABLE),
    "table": lambda c: jnp.asarray(TABLE)[index(c)],
    "interp": lambda c: jnp.interp(c, jnp.array([-1.0, 0.0, 1.0]), jnp.array([0.3, -0.2, 0.8])),
    "searchsorted": lambda c: jnp.searchsorted(jnp.array([-0.5, 0.0, 0.5]), c) * 0.3,
    "reversed twice": lambda c: c[::-1][::-1],
    "rolled and back": lambda c: jnp.roll(jnp.roll(c, 1, 0), -1, 0),
    "own row by index": lambda c: jnp.sin(c[jnp.arange(len(c))]),
    "own row by constant index": lambda c: jnp.stack([jnp.sin(c[s]) for s in range(len(c))]),
    "split and joined": lambda c: jnp.concatenate([c[:1], 0.5 * c[1:]]),
    "set in place": lambda c: c.at[0].multiply(0.5),
    "sorted by itself": lambda c: jnp.sort(c[..., None], -1)[..., 0],
    "maximum with a number": lambda c: jnp.maximum(c, 0.1),
    "to int32 and back": lambda c: (10 * c).astype(jnp.int32) / 10,
    "permuted table": lambda c: jnp.asarray(PER_SERIES)[np.arange(len(c))[::-1]].reshape(-1, *(1,) * (c.ndim - 1)) * (c > 0),
    "einsum": lambda c: jnp.einsum("s...,s->s...", c, jnp.asarray(PER_SERIES)[: len(c)]),
    "mean of itself over a new axis": lambda c: jnp.stack([c, jnp.sin(c)]).mean(0),
    "sum of a stack, by cumsum": lambda c: jnp.cumsum(jnp.stack([c, jnp.sin(c)]), 0)[-1],
}
OWN_EVENT = {
    "sort": lambda c: jnp.sort(c, -1),
    "argmax": lambda c: jax.nn.one_hot(jnp.argmax(c, -1), c.shape[-1]),
    "cumsum": lambda c: jnp.cumsum(c, -1),
    "cummax": lambda c: lax.cummax(c, c.ndim - 1),
    "reversed": lambda c: c[..., ::-1],
    "roll": lambda c: jnp.roll(c, 1, -1),
    "mean": lambda c: c.mean(-1, keepdims=True) + 0 * c,
    "stopped mean": lambda c: lax.stop_gradient(c.mean(-1, keepdims=True)) + 0 * c,
    "compared with its mean": lambda c: 1.0 * (c > c.mean(-1, keepdims=True)),
    "softmax": lambda c: jax.nn.softmax(c, -1),
    "logsumexp": lambda c: jax.nn.logsumexp(c, -1, keepdims=True) + 0 * c,
    "matrix": lambda c: c @ jnp.asarray(MATRIX),
    "dot_general": lambda c: lax.dot_general(c, jnp.asarray(MATRIX), (((1,), (0,)), ((), ()))),
    "gather": lambda c: c[..., np.array([1, 0])],
    "rank": lambda c: 1.0 * jnp.argsort(jnp.argsort(c, -1), -1),
    "own row of a batched dot": lambda c: jnp.einsum("se,sf->s", c, c)[:, None] + 0 * c,
    "inverse": lambda c: jnp.linalg.solve(c[..., :, None] * c[..., None, :] + jnp.eye(c.shape[-1]), jnp.ones((*c.shape, 1)))[
        ..., 0
    ],
    "cholesky": lambda c: jnp.linalg.cholesky(c[..., :, None] * c[..., None, :] + jnp.eye(c.shape[-1]))[..., -1],
    "norm": lambda c: jnp.linalg.norm(c, axis=-1, keepdims=True) + 0 * c,
    "associative_scan": lambda c: lax.associative_scan(jnp.add, c, axis=c.ndim - 1),
    "take_along_axis": lambda c: jnp.take_along_axis(c, jnp.argmax(c, -1, keepdims=True), -1) + 0 * c,
    "cond on the event": lambda c: jax.vmap(lambda row: lax.cond(row[0] > row[1], lambda r: r[::-1], jnp.sin, row))(c),
}

# Functions of (S, *event) some row of which reads another.
OTHERS = {
    "> mean": lambda c: 1.0 * (c > c.mean(0)),
    "> row 0": lambda c: 1.0 * (c > c[0]),
    "argmax": lambda c: jax.nn.one_hot(jnp.argmax(c, 0), len(c), axis=0),
    "sort": lambda c: jnp.sort(c, 0),
    "round of the mean": lambda c: jnp.round(2 * c.mean(0)) + 0 * c,
    "sign of the sum": lambda c: jnp.sign(c.sum(0)) + 0 * c,
    "stopped mean": lambda c: lax.stop_gradient(c.mean(0)) + 0 * c,
    "stopped sum in part": lambda c: c + lax.stop_gradient(c.sum(0) - c),
    "rank": lambda c: 1.0 * jnp.argsort(jnp.argsort(c, 0), 0),
    "cumsum": lambda c: jnp.cumsum(c, 0),
    "stopped cumsum": lambda c: lax.stop_gradient(jnp.cumsum(c, 0)),
    "roll": lambda c: jnp.roll(c, 1, 0),
    "floor of a roll": lambda c: jnp.floor(2 * jnp.roll(c, 1, 0)),
    "max": lambda c: c.max(0) + 0 * c,
    "is the max": lambda c: 1.0 * (c == c.max(0)),
    "median": lambda c: jnp.median(c, 0) + 0 * c,
    "matrix": lambda c: jnp.tensordot(jnp.asarray(np.eye(len(c)) + 0.3), c, 1),
    "reversed": lambda c: c[::-1],
    "floor of reversed": lambda c: jnp.floor(2 * c[::-1]),
    "permuted by data": lambda c: c[jnp.argsort(jnp.asarray(-PER_SERIES[: len(c)]) + 0 * jnp.arange(len(c)))][::-1],
    "cond on row 0": lambda c: lax.cond(c[0].sum() > 0.3, jnp.sin, lambda c: -c, c),
    "while for all": lambda c: lax.while_loop(lambda b: jnp.abs(b).max() > 0.3, lambda b: 0.5 * b, c),
    "any": lambda c: jnp.where(jnp.any(c > 0.4), c, 0.5 * c),
    "loop over rows": loop_over_rows,
    "custom_jvp": slopeless_mean,
    "int of the mean": lambda c: (4 * c.mean(0)).astype(int) + 0 * c,
    "product of signs": lambda c: jnp.prod(jnp.sign(c), 0) + 0 * c,
    "table by the mean": lambda c: jnp.asarray(TABLE)[index(c.mean(0))] + 0 * c,
    "row of the argmax": lambda c: c[jnp.argmax(c.reshape(len(c), -1)[:, 0])] + 0 * c,
    "set in place": lambda c: c.at[-1].set(jnp.round(2 * c[0])),
    "map over rows, with all": lambda c: lax.map(lambda row: 1.0 * (row > c.mean(0)), c),
    "one step of a scan": lambda c: lax.scan(lambda b, row: (jnp.maximum(b, row), b), c[0], c)[0] + 0 * c,
    "far away": lambda c: jnp.where(jnp.abs(c) > 50, c.mean(0), c),
    "far away, if one is": lambda c: jnp.where(jnp.abs(c).max(0) > 50, c.mean(0), c),
    "far away, in a cond": lambda c: lax.cond((c > 50).all(), lambda c: c.mean(0) + 0 * c, lambda c: c, c),
    "far away, by sign": lambda c: jnp.where(c < -50, c[::-1], c),
}
FAR = ("far away", "far away, if one is", "far away, in a cond", "far away, by sign")

# Functions of time (T or T + 1, ...) that mix rows are those of rows that read others, and these.
MIXES = {
    "diff": lambda c: jnp.diff(c, axis=0, prepend=c[:1]),
    "shift": lambda c: jnp.concatenate([c[:1], c[:-1]]),
    "stopped shift": lambda c: lax.stop_gradient(jnp.concatenate([c[1:], c[-1:]])),
    "last row": lambda c: c[-1] + 0 * c,
    "first row": lambda c: jnp.floor(3 * c[0]) + 0 * c,
}

PLACES = ("mean", "scale", "emission", "previous in the emission", "carry", "start", "second site", "observed start")
PLACE_WEIGHTS = (4, 1.5, 2, 1, 1.5, 1, 1, 1)


class Sizes(NamedTuple):
    K: int
    T: int
    plates: tuple[int, ...]
    event: tuple[int, ...]


SIZES = {
    "2 series": Sizes(2, 3, (2,), ()),
    "3 series": Sizes(2, 2, (3,), ()),
    "2 series, event of 2": Sizes(2, 3, (2,), (2,)),
}
AFTER = {"one series": Sizes(2, 4, (), ()), "one series, K = 3": Sizes(3, 3, (), ()), "2 series": Sizes(2, 3, (2,), ())}


def random_coupling(seed: int) -> Tricky:
    """Series of a plate, or times of emissions after the scan, between which a function stands that couples or not."""
    c = Chooser(3, seed)
    is_right = c.chance("legitimate", 0.5)
    return _after_the_scan(c, seed, is_right) if c.chance("after the scan", 0.25) else _of_series(c, seed, is_right)


def base_of(name):
    """Around which number the states are, for a function to do what its name says."""
    return 0.0 if name not in FAR else -60.0 if "by sign" in name else 60.0


def _function(c, functions):
    function = c.pick("function", functions)
    return function, base_of(c.made[-1].removeprefix("function: "))


def _of_series(c, seed, is_right):
    K, T, plates, event = c.pick("size", SIZES, (3, 2, 2))
    functions = OTHERS if not is_right else OWN_EVENT if event and c.chance("over the event", 0.6) else OWN
    function, base = _function(c, functions)
    place = c.pick("read by the", PLACES, PLACE_WEIGHTS)
    starts = place in ("start", "observed start") or c.chance("starts from a site", 0.6)
    when = c.pick("at", ("all steps", "steps whose input says so", "later steps"), (4, 1, 1))
    gate = np.ones(T) if when == "all steps" else (np.arange(T) > 0) * 1.0
    y, shape = c.numbers(T, *plates) + base * max(1, sum(event)), (*plates, *event)
    y_0, covariate = c.numbers(*plates) + base * max(1, sum(event)), c.numbers(*plates)
    has_covariate = c.chance("a covariate by series", 0.3)

    def moved(x):
        """How far the function is from the base, if it follows it."""
        return function(x) - base if base else function(x)

    def model(y, y_0, gate, covariate):
        own = covariate.reshape(*covariate.shape, *(1,) * len(event)) if has_covariate else 0.0

        def step(carry, inputs):
            old, t = carry
            y_t, now = inputs
            now = now if when != "later steps" else 1.0 * (t > 0)
            with plates_of(plates):
                mean = base + 0.5 * (old - base) + own + (0.6 * now * moved(old) if place == "mean" else 0.0)
                scale = 0.6 * jnp.exp(0.4 * now * jnp.tanh(moved(old))) if place == "scale" else 0.6
                x = numpyro.sample("x", dist.Normal(mean, scale).to_event(len(event)))
                seen = x + (0.6 * now * moved(x) if place == "emission" else 0.0)
                seen = seen + (0.6 * now * moved(old) if place == "previous in the emission" else 0.0)
                if place == "second site":
                    z = numpyro.sample("z", dist.Normal(0.6 * now * moved(x), 0.7).to_event(len(event)))
                    seen = seen + z
                emit(seen, y_t)
            return (x + 0.6 * now * moved(x) if place == "carry" else x, t + 1), x

        x_0 = jnp.full(shape, base + 0.1)
        if starts:
            with plates_of(plates):
                x_0 = numpyro.sample("x_0", dist.Normal(jnp.full(shape, base), 1.0).to_event(len(event)))
                if place == "observed start":
                    mean = x_0 + 0.6 * moved(x_0)
                    numpyro.sample("y_0", dist.Normal(mean.sum(-1) if event else mean, 0.5), obs=y_0)
        scan(step, (x_0 + 0.6 * moved(x_0) if place == "start" else x_0, 0), (y, gate))

    names = ("x_0",) * starts + ("x",) + ("z",) * (place == "second site")
    proposals = {name: Proposal(name == "x_0", event, (base if name != "z" else 0.0) + 0.2) for name in names}
    args = tuple(jnp.asarray(a) for a in (y, y_0, gate, covariate))
    return Tricky("couplings", seed, tuple(c.made), is_right, model, args, proposals, K, T, plates)


def _after_the_scan(c, seed, is_right):
    K, T, plates, event = c.pick("size", AFTER, (3, 1, 2))
    over = "series" if plates and not is_right and c.chance("over series", 0.4) else "time"
    is_by_row = over == "series" or (is_right and bool(plates) and c.pick("rows", ("one by one", "together")) == "one by one")
    function, base = _function(c, OWN if is_right else OTHERS if over == "series" else OTHERS | MIXES)
    with_start = c.chance("with the start in front", 0.4)
    starts = with_start or c.chance("starts from a site", 0.5)
    function = jax.vmap(function) if is_by_row else function
    rows = T + with_start
    y = c.numbers(rows, *plates) + base

    def model(y):
        def step(old, _):
            with plates_of(plates):
                x = numpyro.sample("x", dist.Normal(base + 0.7 * (old - base), 0.6))
            return x, x

        x_0 = jnp.full(plates, base + 0.1)
        if starts:
            with plates_of(plates):
                x_0 = numpyro.sample("x_0", dist.Normal(jnp.full(plates, base), 1.0))
        _, xs = scan(step, x_0, None, length=T)
        xs = jnp.concatenate([x_0[None], xs]) if with_start else xs
        mean = xs + 0.6 * (function(xs) - base)
        with plates_of(plates):
            numpyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    names = ("x_0",) * starts + ("x",)
    proposals = {name: Proposal(name == "x_0", (), base + 0.2) for name in names}
    return Tricky("couplings", seed, tuple(c.made), is_right, model, (jnp.asarray(y),), proposals, K, T, plates)
