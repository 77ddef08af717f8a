"""The numeric contract in numpy: slow and obvious, the specification of every backend, byte for byte."""
