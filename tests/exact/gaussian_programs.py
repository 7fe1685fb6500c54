"""Random linear-Gaussian programs with components that have no noise of their own, and what is right by dense algebra.

The oracle follows the program in NumPy: each of its numbers is a mean and a row of coefficients of all independent noise there
is, so that the joint distribution of all sites and observations is one product of matrices.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan

WAYS = ("vector", "sites", "covariance", "delta", "joint", "after")


@dataclasses.dataclass(frozen=True)
class Program:
    """x has noise, z is carried, y is observed in one of several ways, and NaN where it is missing; of N series, or of one.

    x_t = G_t z_{t-1} + g_t + R_t e_t,  z_t = A_t z_{t-1} + B_t x_t + a_t,  y_t = H_t z_t + S_t f_t,  z_0 = start x_0.
    """

    way: str
    start: np.ndarray
    G: np.ndarray
    g: np.ndarray
    R: np.ndarray
    A: np.ndarray
    B: np.ndarray
    a: np.ndarray
    H: np.ndarray
    S: np.ndarray
    y: np.ndarray

    @property
    def series(self):
        return self.y.shape[1:-1]

    def model(self, y, scale=1.0):
        plate = numpyro.plate("series", self.series[0]) if self.series else handlers.mask(mask=True)
        times = lambda matrix, x: jnp.einsum("ij,...j->...i", matrix, x)
        seen = jnp.asarray(~np.isnan(self.y))
        y = jnp.nan_to_num(y)

        def step(z, inputs):
            G, g, R, A, B, a, H, S, y_t, seen_t = inputs
            with plate:
                x = self.sample(times(G, z) + g, scale * R)
                z = times(A, z) + times(B, x) + a
                if self.way == "delta":
                    z = numpyro.sample("z", dist.Delta(z, event_dim=1))
                mean = times(H, z)
                if self.way == "joint":
                    with handlers.mask(mask=seen_t[..., 0]):
                        numpyro.sample("y", dist.MultivariateNormal(mean, scale_tril=S), obs=y_t)
                elif self.way != "after":
                    for i in range(self.y.shape[-1]):
                        with handlers.mask(mask=seen_t[..., i]):
                            numpyro.sample(f"y{i}", dist.Normal(mean[..., i], S[i, i]), obs=y_t[..., i])
            return z, mean

        with plate:
            ones = jnp.ones((*self.series, self.start.shape[-1]))
            first = numpyro.sample("x_0", dist.Normal(0 * ones, ones).to_event(1))
        matrices = (self.G, self.g, self.R, self.A, self.B, self.a, self.H, self.S)
        _, means = scan(step, times(self.start, first), (*map(jnp.asarray, matrices), y, seen))
        if self.way == "after":
            sizes = jnp.asarray(self.S[:, 0, 0])
            with plate, handlers.mask(mask=seen[..., 0]):
                size = sizes[:, None] if self.series else sizes
                numpyro.sample("y", dist.Normal(means[..., 0], size), obs=y[..., 0])

    def sample(self, mean, R):
        if self.way == "sites":
            return jnp.stack([numpyro.sample(f"x{i}", dist.Normal(mean[..., i], R[i, i])) for i in range(len(R))], -1)
        if self.way == "covariance":
            return numpyro.sample("x", dist.MultivariateNormal(mean, R @ R.T))
        return numpyro.sample("x", dist.MultivariateNormal(mean, scale_tril=R))

    def dense(self, scale=1.0):
        """Log evidence, and the mean and covariance of x at all times, ``(T, n)`` and ``(T, n, n)``, of each series."""
        T, n, E, k = len(self.g), self.g.shape[1], self.H.shape[1], self.start.shape[1]
        total = k + T * (n + E)
        z_mean, z = np.zeros(len(self.start)), self.start @ np.eye(k, total)
        means, rows, x_means, x_rows = [], [], [], []
        for t in range(T):
            begin = k + t * (n + E)
            e, f = np.eye(total)[begin : begin + n], np.eye(total)[begin + n : begin + n + E]
            x_mean, x = self.G[t] @ z_mean + self.g[t], self.G[t] @ z + scale * self.R[t] @ e
            z_mean, z = self.A[t] @ z_mean + self.B[t] @ x_mean + self.a[t], self.A[t] @ z + self.B[t] @ x
            means.append(self.H[t] @ z_mean)
            rows.append(self.H[t] @ z + self.S[t] @ f)
            x_means.append(x_mean)
            x_rows.append(x)
        mean, row, x_mean, x_row = (np.concatenate(part) for part in (means, rows, x_means, x_rows))
        found = []
        for y in np.moveaxis(self.y.reshape(T, -1, E), 1, 0):
            seen = ~np.isnan(y.ravel())
            own, residual = row[seen], y.ravel()[seen] - mean[seen]
            covariance = own @ own.T
            log_z = -0.5 * (residual @ np.linalg.solve(covariance, residual) + np.linalg.slogdet(2 * np.pi * covariance)[1])
            gain = x_row @ own.T @ np.linalg.pinv(covariance, hermitian=True)
            left = (x_row - gain @ own).reshape(T, n, total)
            found.append((log_z, (x_mean + gain @ residual).reshape(T, n), left @ left.transpose(0, 2, 1)))
        return tuple(np.stack(part) for part in zip(*found, strict=True))


def random_program(seed):
    rng = np.random.default_rng(seed)
    way = WAYS[seed % len(WAYS)]
    T, n, E = rng.integers(1, 9), rng.integers(1, 4), 1 if way == "after" else rng.integers(1, 4)
    d, k = rng.integers(1, 9), rng.integers(1, 3)
    series = () if rng.random() < 0.5 else (3,)
    constant = lambda *shape: np.broadcast_to(rng.normal(size=shape), (T, *shape)).copy()
    varying = lambda *shape: rng.normal(size=(T, *shape))
    any_of = lambda *shape: (constant if rng.random() < 0.5 else varying)(*shape)
    A = 0.5 * any_of(d, d)
    if rng.random() < 0.5:  # a window of lags
        A = np.broadcast_to(np.eye(d, k=-1), (T, d, d)).copy()
    R = np.tril(0.5 * any_of(n, n))
    index = np.arange(n)
    R[:, index, index] = np.abs(R[:, index, index]) + 0.2
    if way == "sites":
        R = R * np.eye(n)
    if way == "covariance":
        R = R * (rng.random(n) < 0.6)  # columns of zero: less noise than numbers
    S = np.tril(0.3 * any_of(E, E))
    index = np.arange(E)
    S[:, index, index] = np.abs(S[:, index, index]) + 0.3
    if way != "joint":
        S = S * np.eye(E)
    y = 2 * rng.normal(size=(T, *series, E))
    missing = rng.random(y.shape) < 0.25
    y[missing if way != "joint" else np.broadcast_to(missing[..., :1], y.shape)] = np.nan
    return Program(
        way, rng.normal(size=(d, k)), 0.5 * any_of(n, d), any_of(n), R, A, 0.7 * any_of(d, n), any_of(d), any_of(E, d), S, y
    )
