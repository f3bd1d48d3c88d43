"""Kernels for NVIDIA GPUs, in Triton: products that read experts by index from the resident
weights, attention over the KV pool, the draw, and the statistic. Its modules are imported only
where there is a GPU: triton comes with torch's CUDA builds alone."""
