"""Speed of layers, steps, attention and peers on one device, and the targets they are held against."""
