"""A backend of Triton that compiles nothing: with TRITON_INTERPRET=1, kernels are interpreted on the CPU."""
