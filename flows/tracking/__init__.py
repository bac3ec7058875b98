"""Curves of runs in trackers of experiments: TensorBoard, W&B, MLflow, trackio. Each is an extra of its own."""
