"""Generation: the paged latent cache, a session of sequences, the replayed decoding pass, sampling, `generate`."""
