"""Load data sets that other packages ship."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Returns(NamedTuple):
    """Daily returns and the days they belong to.

    :param values: returns in percent, centred, of shape ``(T,)``.
    :param dates: the trading days, ``numpy.datetime64`` to the day, of shape ``(T,)``, ascending.
    """

    values: Float[np.ndarray, " T"]
    dates: np.ndarray


def load_sp500_returns(num_days: int = 2516) -> Returns:
    """The last daily returns of the S&P 500 index in the sample 1999-2018; by default those of 2009 to 2018.

    A return is ``100 * log(close_t / close_{t-1})``: the change in percent from one close to the next. The mean over the
    days that were asked for is subtracted, so that a model of the volatility needs no term for the drift. Nothing is
    downloaded: the closes ship with the package `arch <https://arch.readthedocs.io>`_, as ``arch.data.sp500`` (column
    "Adj Close", 4 January 1999 to 31 December 2018, from Yahoo! Finance).

    :param num_days: how many of the last days to take, T, at most 5030.
    :return: the returns and their days, both of shape ``(T,)``.
    :raises ImportError: if `arch` is not installed.
    :raises ValueError: if `num_days` is not between 1 and the number of returns there are.

    .. doctest::

        >>> from numpyro_pvmc.datasets import load_sp500_returns
        >>> y, dates = load_sp500_returns()
        >>> y.shape, str(dates[0]), str(dates[-1])
        ((2516,), '2009-01-02', '2018-12-31')
        >>> str(dates[y.argmin()]), round(float(y.min()), 2)  # the first Monday after the US lost its AAA rating
        ('2011-08-08', -6.94)
    """
    try:
        from arch.data.sp500 import load
    except ImportError as error:  # an optional package, needed by this data set alone
        raise ImportError(
            "`load_sp500_returns` reads the prices that ship with the package `arch`, which could not be imported. "
            'Install it with `pip install "numpyro_pvmc[demo]"`.'
        ) from error
    closes = load()["Adj Close"]
    if not 1 <= num_days < len(closes):
        raise ValueError(
            f"`num_days` must be between 1 and {len(closes) - 1}, the number of returns there are; it was {num_days}."
        )
    returns = 100 * np.diff(np.log(closes.to_numpy()))[-num_days:]
    return Returns(values=returns - returns.mean(), dates=closes.index.to_numpy()[-num_days:].astype("datetime64[D]"))
