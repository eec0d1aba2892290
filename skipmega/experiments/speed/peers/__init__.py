"""What others do to skip work, each in a few lines as a user of plain PyTorch or of their library writes it.

A peer is a layer, [b, s, hidden] to the same shape, around a :class:`PlainLayer`; tests compare each with
float64 arithmetic of its description.
"""
