"""From tokens to what a stage trains on: inputs, targets, loss positions, and the loss."""
