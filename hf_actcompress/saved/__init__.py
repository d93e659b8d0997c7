"""The tensors that autograd saves for the backward pass, kept compressed in between."""
