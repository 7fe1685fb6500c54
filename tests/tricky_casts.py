"""Write programs whose carry starts in one type and goes on in another: what NumPyro's `scan` takes, and what it raises at."""

import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan

from tricky import Chooser, Proposal, Tricky, emit, plates_of, stock_error

STARTS = {  # functions of a shape
    "0": lambda shape: 0,
    "1": lambda shape: 1,
    "0.3": lambda shape: 0.3,
    "False": lambda shape: False,
    "np.float64": lambda shape: np.float64(0.3),
    "np.float32": lambda shape: np.float32(0.3),
    "np.int64": lambda shape: np.int64(1),
    "np.int32": lambda shape: np.int32(1),
    "np.zeros": lambda shape: np.zeros(shape),
    "np.ones of int": lambda shape: np.ones(shape, int),
    "jnp.zeros": lambda shape: jnp.zeros(shape),
    "jnp.zeros, float32": lambda shape: jnp.zeros(shape, jnp.float32),
    "jnp.ones, int32": lambda shape: jnp.ones(shape, jnp.int32),
    "jnp.asarray(1)": lambda shape: jnp.asarray(1),
    "jnp.asarray(0.3)": lambda shape: jnp.asarray(0.3),
    "jnp.full(shape, 0)": lambda shape: jnp.full(shape, 0),
    "jnp.full(shape, 0.3)": lambda shape: jnp.full(shape, 0.3),
    "jnp.zeros, bool": lambda shape: jnp.zeros(shape, bool),
}
WEAK = ("0", "1", "0.3", "jnp.asarray(1)", "jnp.asarray(0.3)")
FULL = ("np.zeros", "jnp.zeros", "jnp.full(shape, 0.3)", "jnp.full(shape, 0)", "np.ones of int", "jnp.zeros, float32")

STATES = {  # of the state leaf, before and after: functions of the site and of the old leaf
    "x": lambda x, old: x,
    "tanh(x)": lambda x, old: jnp.tanh(x),
    "2 x + 1": lambda x, old: 2 * x + 1,
    "x > 0": lambda x, old: x > 0,
    "x, rounded to int": lambda x, old: jnp.round(x).astype(int),
    "x, as float32": lambda x, old: x.astype(jnp.float32),
    "x, as what the carry is": lambda x, old: x.astype(jnp.result_type(old)),
    "x, as a Python number's type": lambda x, old: jnp.where(x > 0, 1, 0),
}
STATE_WEIGHTS = (8, 2, 2, 1, 1.5, 1.5, 2, 1)

CLOCKS = {  # of the old leaf and an input
    "+ 1": lambda t, dt: t + 1,
    "+ 0.4": lambda t, dt: t + 0.4,
    "- 1": lambda t, dt: t - 1,
    "0.5 t + 0.3": lambda t, dt: 0.5 * t + 0.3,
    "+ dt": lambda t, dt: t + dt,
    "t // 2 + 1": lambda t, dt: t // 2 + 1,
    "t / 2 + 1": lambda t, dt: t / 2 + 1,
    "sin(t + 1)": lambda t, dt: jnp.sin(t + 1),
    "where(t > 0, t, t + 0.5)": lambda t, dt: jnp.where(t > 0, t, t + 0.5),
    "+ 1, as int32": lambda t, dt: (t + 1).astype(jnp.int32) if hasattr(t, "astype") else jnp.int32(t + 1),
    "+ 1, as what the carry is": lambda t, dt: (t + 1.6).astype(jnp.result_type(t)),
    "not t": lambda t, dt: jnp.logical_not(t),
    "maximum(t, 0.2)": lambda t, dt: jnp.maximum(t, 0.2),
    "unchanged": lambda t, dt: t,
}
CLOCK_WEIGHTS = (2, 5, 1, 2, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1)
STEPS = {"float64": np.float64, "float32": np.float32, "int32": np.int32, "int64": np.int64}


class Pair(NamedTuple):
    state: Any
    clock: Any


@flax.struct.dataclass
class FlaxPair:
    state: Any
    clock: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class RegisteredPair:
    state: Any
    clock: Any


FORMS = {  # made of a state and a clock, and taken apart
    "tuple": (lambda s, t: (s, t), lambda c: c),
    "list": (lambda s, t: [s, t], lambda c: c),
    "dict": (lambda s, t: {"state": s, "clock": t}, lambda c: (c["state"], c["clock"])),
    "NamedTuple": (Pair, lambda c: (c.state, c.clock)),
    "flax.struct": (FlaxPair, lambda c: (c.state, c.clock)),
    "register_dataclass": (RegisteredPair, lambda c: (c.state, c.clock)),
    "nested": (lambda s, t: {"all": ((s,), [t])}, lambda c: (c["all"][0][0], c["all"][1][0])),
    "with None": (lambda s, t: (None, s, {"none": None, "clock": t}), lambda c: (c[1], c[2]["clock"])),
    "bare, without a clock": (lambda s, t: s, lambda c: (c, None)),
}


def random_cast(seed: int) -> Tricky:
    """A chain with a state leaf and mostly a clock in the carry, each started in a type of its own."""
    c = Chooser(1, seed)
    plates, event = c.pick("shape", {"()": ((), ()), "2 series": ((2,), ()), "event of 2": ((), (2,))}, (4, 1, 1))
    K, T = (2, c.pick("T", (2, 3))) if plates else (c.pick("K", (2, 3)), c.pick("T", (2, 3, 4)))
    shape = (*plates, *event)
    form = c.pick("carry", FORMS, (3, 1, 1, 1, 1, 1, 1, 1, 2))
    has_clock = "bare, without a clock" not in c.made[-1]
    # Scalars do not grow: NumPyro takes none of them where the state has a shape.
    starts = dict.fromkeys(FULL if shape and not c.chance("the start may be a scalar", 0.3) else STARTS)
    starts = {name: STARTS[name] for name in starts}
    weights = [3 if name in WEAK else 1 for name in starts]
    from_site = c.chance("the state starts from a site", 0.2)
    start = None if from_site else c.pick("state starts as", starts, weights)
    state_of = c.pick("state after a step", STATES, STATE_WEIGHTS)
    clock_start = c.pick("clock starts as", STARTS, [4 if name in WEAK else 1 for name in STARTS]) if has_clock else None
    tick = c.pick("clock after a step", CLOCKS, CLOCK_WEIGHTS) if has_clock else None
    dt = np.ones(T, c.pick("dt", STEPS)) if has_clock else np.ones(T)
    changes_form = c.chance("a list returns where a tuple came", 0.04)
    reads = c.pick("the clock is read by", ("the mean", "the emission", "the scale", "a table")) if has_clock else "nothing"
    table = c.numbers(8)
    y = c.numbers(T, *plates)
    state_of_start = {"as it is": lambda x: x, "as float32": lambda x: x.astype(jnp.float32), "rounded": jnp.round}
    state_of_start = c.pick("which is taken", state_of_start, (3, 1, 1)) if from_site else None

    make, take = form

    def model(y, dt):
        def step(carry, inputs):
            y_t, dt_t = inputs
            old, t = take(carry)
            clock = 0.0 if t is None else jnp.asarray(t)
            number = (
                clock
                if t is None
                else jnp.asarray(table)[clock.astype(int) % 8]
                if reads == "a table"
                else jnp.sin(2.0 * clock)
            )
            mean, scale = 0.6 * jnp.asarray(old, float), 0.6
            if reads in ("the mean", "a table"):
                mean = mean + number
            if reads == "the scale":
                scale = 0.6 * jnp.exp(0.5 * number)
            with plates_of(plates):
                x = numpyro.sample("x", dist.Normal(jnp.broadcast_to(mean, shape), scale).to_event(len(event)))
                emit(x + (number if reads == "the emission" else 0.0), y_t)
            new = make(state_of(x, old), None if t is None else tick(t, dt_t))
            return (list(new) if changes_form and isinstance(new, tuple) else new), x

        state = start(shape) if start else None
        if from_site:
            with plates_of(plates):
                state = state_of_start(numpyro.sample("x_0", dist.Normal(jnp.zeros(shape), 1.0).to_event(len(event))))
        scan(step, make(state, clock_start(()) if has_clock else None), (y, dt))

    proposals = {"x_0": Proposal(True, event)} if from_site else {}
    proposals["x"] = Proposal(False, event)
    program = Tricky("casts", seed, tuple(c.made), True, model, (jnp.asarray(y), jnp.asarray(dt)), proposals, K, T, plates)
    # Its chain is first-order in any case: what NumPyro raises at is what is not legitimate.
    return program._replace(is_legitimate=stock_error(program) is None)
