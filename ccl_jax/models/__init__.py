"""Encoders, projector, neck and decoder, and the weights that go into them."""
