"""Operators: what costs time, as functions of plain tensors and numbers.  Nothing here knows a codec.

| file | what it computes |
| --- | --- |
| quantize.py | values to packed codes and back: groups, one scale, quantiles, tables, 8-bit floats |
| rotated.py | groups rotated, to codes of the levels of a Gaussian and back |
| hadamard.py, gaussian.py, trellis.py, allocation.py | its parts: rotation, levels, Viterbi, the bits of groups |
| bitmaps.py, selection.py | flags and masks in one bit; the k largest magnitudes and where they are |
| tables.py, codebooks.py | groups with sorted limits: quantiles and centroids; which centroids |
| packing.py, scales.py, rounding.py | codes of 3 bits in 3 bits; scales in bf16; noise from a counter |
| rows.py, layout.py, reductions.py | a tensor as rows of groups; its order in memory; extremes and samples |
| compiled.py, cpu/, memory.py | who computes it: torch.compile, C++; memory that is used again |
"""
