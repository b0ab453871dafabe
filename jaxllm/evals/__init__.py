"""Metrics that need no model of ours: statistics with intervals, image and text metrics."""
