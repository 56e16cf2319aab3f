"""Training the same decoder on the same mesh: loss, optimizer step, data and the recipe of the bundled model."""
