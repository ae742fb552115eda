"""What models are trained and evaluated on: datasets, their transforms, and the picture world."""
