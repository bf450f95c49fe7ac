"""Hooks that prune a stock decoder during its prefill."""
