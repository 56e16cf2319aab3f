"""Training of a sharded decoder: loss, optimizer step, data, the recipe of the bundled model, and its evaluation."""
