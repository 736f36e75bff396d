"""Training on top of the ops: a readable loop over torch, restartable at any step."""
