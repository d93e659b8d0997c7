"""What costs time: arithmetic on plain tensors and numbers.  Operators know no codec."""
