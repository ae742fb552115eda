"""What models are trained and judged on: datasets, their transforms, and the picture world."""
