"""What a run kept and what it cost."""
