"""Compositions of ops, with autograd and without kernels of their own: one file each."""
