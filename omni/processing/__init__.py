"""From clips, pictures, sound and text to the tensors the model reads."""
