"""The data sets against what is known of them from elsewhere."""

import sys

import numpy as np
import pytest

from numpyro_pvmc.datasets import load_sp500_returns


def test_sp500_returns_are_ten_years_of_centred_percentages():
    pytest.importorskip("arch")
    values, dates = load_sp500_returns()
    assert values.shape == dates.shape == (2516,)
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 1e-12
    assert 1.0 < values.std() < 1.1  # percent a day: 16 to 17 percent a year


def test_sp500_days_are_the_trading_days_of_2009_to_2018():
    pytest.importorskip("arch")
    dates = load_sp500_returns().dates
    assert dates.dtype == np.dtype("datetime64[D]")
    assert (dates[0], dates[-1]) == (np.datetime64("2009-01-02"), np.datetime64("2018-12-31"))
    assert (np.diff(dates) > np.timedelta64(0, "D")).all()
    assert np.is_busday(dates).all()


def test_sp500_returns_belong_to_their_days():
    pytest.importorskip("arch")
    values, dates = load_sp500_returns()
    of = dict(zip(dates.astype(str).tolist(), values, strict=True))
    # Published closes: 2351.10 on 24 December 2018, 2467.70 on the 26th; 2488.83 on the 27th, 2485.74 on the 28th.
    # The mean that was subtracted is not published, so it is the difference of two returns that is compared.
    expected = 100 * (np.log(2467.70 / 2351.10) - np.log(2485.74 / 2488.83))
    np.testing.assert_allclose(of["2018-12-26"] - of["2018-12-28"], expected, atol=1e-3)


def test_fewer_days_are_the_last_ones_centred_by_themselves():
    pytest.importorskip("arch")
    values, dates = load_sp500_returns()
    last_values, last_dates = load_sp500_returns(num_days=250)
    np.testing.assert_array_equal(last_dates, dates[-250:])
    np.testing.assert_allclose(last_values, values[-250:] - values[-250:].mean(), rtol=1e-12)


@pytest.mark.parametrize("num_days", [0, -1, 5031])
def test_a_number_of_days_that_there_is_not_is_refused(num_days):
    pytest.importorskip("arch")
    with pytest.raises(ValueError, match=f"between 1 and 5030.*it was {num_days}"):
        load_sp500_returns(num_days)


def test_without_arch_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "arch.data.sp500", None)
    with pytest.raises(ImportError, match=r'`arch`.*pip install "numpyro_pvmc\[demo\]"'):
        load_sp500_returns()
