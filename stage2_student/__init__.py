"""Stage 2: train the students, LoRA adapters, from the cache. Loads the students only, never the teacher."""
