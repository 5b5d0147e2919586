"""Tools around training: finders for the learning rate and the batch size, evaluation, prediction, and the
verification of resumes."""
