"""Compositions of ops with gradients of their own, which have no kernel."""
