"""Decode on NVIDIA GPUs: Triton kernels that read experts by index from the resident weights, and
CUDA graphs of whole steps. Imported only where there is a GPU: triton comes with torch's CUDA
builds alone."""
