"""Training of embedders: losses over the vectors of a whole step, and exact gradients in little memory."""
