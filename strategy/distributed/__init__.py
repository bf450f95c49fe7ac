"""Processes of one run: how they exchange data, share a model and stop together."""
