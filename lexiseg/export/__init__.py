"""Models as graphs that run without PyTorch: `exporting` writes a folder and `runtime` predicts from it."""
