"""What models are trained with: losses on class masks and on regions, one file each."""
