"""Evaluation under the script names that callers of Video-LLaVA use."""
