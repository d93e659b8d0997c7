"""Changes of a tensor before and after quantization: rotation, equalization, patches, levels, shares of bits."""
