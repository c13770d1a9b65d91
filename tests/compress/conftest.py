"""Torch's tracer logs at debug level; kept out of failure reports."""

import logging

import pytest


@pytest.fixture(autouse=True)
def _quiet_tracer():
    before = logging.root.manager.disable
    logging.disable(logging.DEBUG)
    yield
    logging.disable(before)
