"""Sites: the places where training keeps or moves a tensor."""
