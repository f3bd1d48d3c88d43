"""Compiled inner loops for decode on a CPU in bfloat16, where torch's own kernels use only a
fraction of the memory bandwidth. Each loop is tested against float64; plain torch runs where a loop
does not apply.
"""
