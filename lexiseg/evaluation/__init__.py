"""Measuring segmentation: streaming metrics, the evaluation loop and its report."""
