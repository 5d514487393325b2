"""Training of small models on text: data, loop, pictures. What `k2kernels train` runs."""
