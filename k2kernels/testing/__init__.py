"""Inputs and comparisons shared by the tests and the benchmarks."""
