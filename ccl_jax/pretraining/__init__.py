"""The shipped encoder: procedural images, and the command that learned from them."""
