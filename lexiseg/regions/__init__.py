"""Region classifiers: what proposed regions show, from one pass of CLIP or from crops."""
