"""Looking inside a model: what the papers measure of towers and draw as figures."""
