"""A small world of captioned shape scenes with a trained CLIP teacher, for demos and tests without downloads."""
