"""Journals, requests and images of evaluations, for the lmms-eval models and the video script."""
