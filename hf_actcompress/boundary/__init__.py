"""The simulated boundary: activations and gradients compressed where a pipeline would cut the model."""
