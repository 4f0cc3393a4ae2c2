"""Open weights in our modules: one table for each family, complete or it raises."""
