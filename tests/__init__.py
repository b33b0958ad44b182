"""Tests, and what they share in `tests.support`."""

import pytest

pytest.register_assert_rewrite("tests.support")
