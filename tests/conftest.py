"""Settings that all tests share."""

from hypothesis import HealthCheck, settings

# The first example of a fresh clone builds Unicode tables, and a busy machine is no failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
