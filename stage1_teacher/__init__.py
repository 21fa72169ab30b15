"""Stage 1: run the teacher over the training examples once and cache what it says about every answer token."""
