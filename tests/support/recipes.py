"""Recipes that tests of the language begin with."""

from __future__ import annotations

LINEAR = """\
merge_method: linear
models:
  - model: models/a
    parameters:
      weight: 1.0
  - model: models/b
    parameters:
      weight: 0.3
"""
TASK = """\
merge_method: task_arithmetic
base_model: base
models:
  - model: base
  - {model: ft1, parameters: {weight: 0.6}}
  - {model: ft2, parameters: {weight: -0.3}}
"""
PASS = """\
merge_method: passthrough
models: [{model: a}]
"""
