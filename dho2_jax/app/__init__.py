# SPDX-License-Identifier: Apache-2.0
"""The `dho2` application: training runs, comparisons and pictures over the core."""
