"""A model as layers in the order in which they run, and passes of it that leave no trace."""
