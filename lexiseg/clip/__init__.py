"""CLIP through open_clip: loading by name, towers run our way, text embeddings, learned prompts, mask attention."""
