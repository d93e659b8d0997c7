"""Changes of a tensor before and after quantization: equalization, patches, prototypes."""
