# SPDX-License-Identifier: Apache-2.0
"""Datasets, whose batches are functions of a seed and a step."""
