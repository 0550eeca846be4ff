# SPDX-License-Identifier: Apache-2.0
"""The study "Adam or Gauss-Newton?": experiments that anyone can rerun with ``parabola study``.

The question is that of Liu, Bansal, Morwani, Vyas, Alvarez-Melis and Kakade (arXiv:2510.13680). The
recipes are this library's own reconstruction, not the paper's settings.
"""
