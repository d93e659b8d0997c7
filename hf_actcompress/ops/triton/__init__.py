"""The operators in Triton, for GPUs: compiled at their first use for a dtype and a number of bits.

With TRITON_INTERPRET=1 they run on CPU tensors, which is how they are tested; benchmarks/kernels_compiled.py compiles
them ahead of time and writes down registers, spills and shared memory.
"""
