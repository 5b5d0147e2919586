"""Work beside training: finders for the learning rate and the batch size, and prediction."""
