"""Triton kernels for NVIDIA GPUs: matrix products that read experts by index from the resident
weights, attention over the KV pool, sampling, and the statistic. Its modules are imported only
where there is a GPU, since triton comes only with torch's CUDA builds."""
