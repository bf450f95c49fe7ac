"""Strategies and budgets compared on a task: stored runs, tables and a report."""
