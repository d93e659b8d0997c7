"""Operators: what costs time, as functions of plain tensors and numbers.  Nothing here knows a codec.

| file | what it computes |
| --- | --- |
| library.py | how an operator is made: a definition in plain torch, C++ (cpu/) and Triton (triton/) forms of it |
| groups.py | values to packed codes and back, each group with a minimum and a step |
| float8.py | the same by 8-bit floats |
| rotated.py | groups rotated, to codes of the levels of a Gaussian and back |
| hadamard.py, gaussian.py, trellis.py, allocation.py | its parts: rotation, levels, Viterbi, the bits of groups |
| bitmaps.py, selection.py | flags and masks in one bit; the k largest magnitudes and where they are |
| tables.py, codebooks.py | groups with sorted limits: quantiles and centroids; which centroids |
| ranges.py, reductions.py | scales of tensors and features; samples |
| packing.py, scales.py, rounding.py | codes of 3 bits in 3 bits; scales in bf16; noise from a counter |
| layout.py, memory.py | a tensor's order in memory; memory that is used again |
"""
