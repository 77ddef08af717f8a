"""Carries out steps on accelerators, beside the CPU."""
