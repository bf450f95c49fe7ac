"""Greedy generation by fused layers and CUDA graphs."""
