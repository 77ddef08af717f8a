"""Outputs checked against their receipts, and made again from them."""
