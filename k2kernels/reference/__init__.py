"""The definition of every op in plain PyTorch; same file, function and argument names as `k2kernels.ops`."""
