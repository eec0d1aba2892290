"""How a decoder is composed."""
