"""Zero-shot video question answering: inference and scoring."""
