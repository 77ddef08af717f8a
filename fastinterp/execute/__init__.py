"""Carries out a plan: opens files, runs steps in rounds, writes outputs, reports what was done."""
