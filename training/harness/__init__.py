"""What the training scripts share: settings, loop, results."""
