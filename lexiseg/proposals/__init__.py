"""Mask proposals: MaskFormer, Mask2Former and SAM from `transformers`, and ground-truth masks."""
