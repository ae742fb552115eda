"""Speed, memory and scale of lexiseg, measured as ratios in one run."""
