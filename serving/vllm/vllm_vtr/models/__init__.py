"""The stock models of vLLM, made to prune; one file each, since importing one should not need the others."""
