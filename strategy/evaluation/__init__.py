"""What the lmms-eval models and the video script share."""
