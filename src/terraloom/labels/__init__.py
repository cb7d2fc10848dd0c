"""Labels: reading, aligning to the grid, folds, chips."""
