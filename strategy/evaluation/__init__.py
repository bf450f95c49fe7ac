"""Journals, requests, questions and visuals of evaluations, for the lmms-eval models and the video script."""
