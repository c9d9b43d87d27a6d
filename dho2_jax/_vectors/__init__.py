# SPDX-License-Identifier: Apache-2.0
"""Vectors: how they are stored, and on which devices."""
