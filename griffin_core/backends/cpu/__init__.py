"""Compiled inner loops for decode on a CPU in bfloat16, where torch's own are far from what memory
allows. Each is tested against float64; where they do not run, plain torch does.
"""
