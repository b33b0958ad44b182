"""The scripts of `examples/` run, and show what they promise."""

from __future__ import annotations

import importlib.util

from tests.support.documentation import ROOT


def test_forecast() -> None:
    """The model forecasts better than to repeat the last sample."""
    spec = importlib.util.spec_from_file_location("forecast", ROOT / "examples" / "forecast.py")
    assert spec is not None and spec.loader is not None
    forecast = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(forecast)
    error, repeated = forecast.main()
    assert error < 0.9 * repeated
