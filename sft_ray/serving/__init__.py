"""Using a trained model: answers for new inputs, scores on a split."""
